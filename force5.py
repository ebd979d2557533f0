from net import partita, task

model, loss_fn, batch, optimizer = task()
forced = partita.Constraints(data=2, tensor=2, pipeline=1, fully_sharded=True)
with partita.parallelize(model, optimizer, loss_fn, batch, plan=forced, compile=False) as step:
    print(step(batch).loss, step.plan.num_workers)
    print(step.plan.inputs["blocks.0.up.weight"])
