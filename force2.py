from net import partita, task

model, loss_fn, batch, optimizer = task()
megatron = {
    "embed.weight": {"tensor": "S(0)"},                # rows of the vocabulary
    "blocks.*.[qkv].*": {"tensor": "S(0)"},            # weights and biases, by heads
    "blocks.*.out.weight": {"tensor": "S(1)"},
    "blocks.*.up.*": {"tensor": "S(0)"},
    "blocks.*.down.weight": {"tensor": "S(1)"},
    "head.*": {"tensor": "S(0)"},
}
forced = partita.Constraints(data=1, tensor=2, pipeline=1, inputs=megatron)
with partita.parallelize(model, optimizer, loss_fn, batch, plan=forced, compile=False) as step:
    print([step(batch).loss for _ in range(3)])
