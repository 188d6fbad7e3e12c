"""The chunked linear recurrence: decay by head, token or channel, delta rule, bonus."""

from pallas_kernels.linear.core import linear_recurrence as linear_recurrence
from pallas_kernels.linear.spec import LinearSpec as LinearSpec
from pallas_kernels.linear.spec import Operands as Operands
from pallas_kernels.linear.step import linear_step as linear_step
