"""Floor 8: plans as the configuration of engines that run on thousands of GPUs, and back."""

from partita.export.deepspeed import read_deepspeed as read_deepspeed
from partita.export.deepspeed import to_deepspeed as to_deepspeed
from partita.export.layout import TrainingLayout as TrainingLayout
from partita.export.layout import layout_of as layout_of
from partita.export.layout import layout_of_plan as layout_of_plan
from partita.export.megatron import read_megatron as read_megatron
from partita.export.megatron import to_megatron as to_megatron
from partita.export.torchtitan import read_torchtitan as read_torchtitan
from partita.export.torchtitan import to_torchtitan as to_torchtitan
