from net import partita, task

model, loss_fn, batch, optimizer = task()
forced = partita.Constraints(data=1, tensor=2, pipeline=1, inputs={"batch*": {"tensor": "S(1)"}})
with partita.parallelize(model, optimizer, loss_fn, batch, plan=forced, compile=False) as step:
    print([step(batch).loss for _ in range(3)])
