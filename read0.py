import partita

plan = partita.Plan.load("tensor.json")
print(plan.axes, plan.num_microbatches, plan.schedule)   # {'data': 1, 'pipeline': 1, 'tensor': 2} 4 1f1b
print(plan.inputs["blocks.0.up.weight"])                 # {'tensor': 'S(0)'}
print(plan.rules["addmm"])                               # {'tensor': 'S0 R S1 -> S1'}
print(plan.prediction.step_time_s, plan.prediction.gap)
