"""The peers that partita's step time is raced against, and the race.

`roster` names the peers; `child` is the program of their processes; a module a peer prepares its step (`plain`, `ddp`,
`fsdp`, `deepspeed_zero`, `jax_data`, `partita_auto`); `field` starts and asks them; `race` lets them step in turns;
`verdict` judges. This package, `roster`, `child`, `workload`, `choose` and the `jax_*` modules import no torch: the
interpreter of a peer need not have it.
"""
