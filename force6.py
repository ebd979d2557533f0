from net import partita, task

model, loss_fn, batch, optimizer = task()
forced = partita.Constraints(data=1, tensor=1, pipeline=2, num_microbatches=4, schedule="1f1b")
with partita.parallelize(model, optimizer, loss_fn, batch, plan=forced, compile=False) as step:
    print([step(batch).loss for _ in range(3)], step.plan.stage_starts)
