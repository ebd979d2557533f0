from collections import Counter

from net import partita, task

model, loss_fn, batch, optimizer = task()
forced = partita.Constraints(data=1, tensor=2, pipeline=1, num_microbatches=2)
with partita.parallelize(model, optimizer, loss_fn, batch, plan=forced, compile=False) as step:
    step.timeline()              # starts recording
    step(batch)
    timeline = step.timeline()   # the step just made
    print(Counter(event.kind for event in timeline.of_worker(0)))
    print(f"{timeline.busy_time_s(0) / timeline.step_time_s:.0%} of the step computing")
