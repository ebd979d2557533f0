from net import partita, task

model, loss_fn, batch, optimizer = task()
forced = partita.Constraints(data=2, tensor=1, pipeline=1, fully_sharded=True)
with partita.parallelize(model, optimizer, loss_fn, batch, plan=forced, compile=False) as step:
    print([step(batch).loss for _ in range(3)])
    print(step.plan.prediction.memory_bytes, step.plan.prediction.bytes_sent)
