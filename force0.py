from net import partita, task

model, loss_fn, batch, optimizer = task()
forced = partita.Constraints(data=2, tensor=1, pipeline=1)
with partita.parallelize(model, optimizer, loss_fn, batch, plan=forced, compile=False) as step:
    print([step(batch).loss for _ in range(3)])   # 7.1312, 6.4983, 5.8670
