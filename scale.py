import partita

cluster = partita.Cluster.preset("8x8xH100")     # machines x GPUs x kind
print(len(cluster.machines), len(cluster.processes))   # 8 64

import torch

from net import Net, loss_fn, partita
from partita.planner.scale.plan import ScalePlanner, replan
from partita.planner.scale.solution import ScaleConstraints

with torch.device("meta"):                              # no weight is allocated
    model = Net(vocab=50304, hidden=4096, layers=32).to(torch.bfloat16)
    tokens = torch.empty(512, 2048, dtype=torch.int64)  # the global batch; only shapes count

planner = ScalePlanner(model, loss_fn, (tokens, tokens))   # captures a few blocks: about 3 s
solution = planner.plan(partita.Cluster.preset("8x8xH100"))
print(solution.text())
print(f"{solution.step_time_s:.2f} s a step, {solution.flops_per_device_s / 1e12:.0f} TFLOP/s a device")
print(f"at most {solution.gap:.0%} could be saved")
for reason in solution.reasons:
    print("-", reason)
for other in solution.alternatives:
    print("instead:", other.text, other.reason)

fixed = planner.plan(partita.Cluster.preset("8x8xH100"), ScaleConstraints(tensor=8, pipeline=2, zero=1))
print(fixed.text())              # data 4 tensor 8 pipeline 2 virtual 4, 8 x 16 samples, zero 1, sequence parallel
print(fixed.placements["blocks.*.up.weight"], fixed.placements["blocks.*.down.weight"])   # S(0) S(1)
print(fixed.stages[0])           # (('input', 'blocks.3'), ('blocks.8', 'blocks.11'), ...)

larger = replan(solution, cluster=partita.Cluster.preset("32x8xH100"))   # nothing is captured again
print(larger.text())

from partita.export import layout_of, read_megatron, to_deepspeed, to_megatron, to_torchtitan

layout = layout_of(fixed)
arguments = to_megatron(layout)                  # Megatron-LM's command line
print(" ".join(arguments))
assert read_megatron(arguments, num_devices=64) == layout

cluster = partita.Cluster.preset("8x8xH100")
print(to_torchtitan(layout_of(planner.plan(cluster, ScaleConstraints(tensor=8, pipeline=2, zero=2)))))   # TOML
print(to_deepspeed(layout_of(planner.plan(
    cluster, ScaleConstraints(tensor=2, pipeline=1, zero=1, recompute="full", sequence_parallel=False)
))))                                             # JSON
