from net import partita, task

model, loss_fn, batch, optimizer = task()
forced = partita.Constraints(data=1, tensor=2, pipeline=1)
with partita.parallelize(model, optimizer, loss_fn, batch, plan=forced, compile=False) as step:
    print(step(batch).loss)
    print(step.plan.inputs["blocks.0.up.weight"], step.plan.inputs["blocks.0.down.weight"])
    # {'tensor': 'S(0)'} {'tensor': 'S(1)'}
