"""How tuning fits into memory: counted before it starts, not found out on the way (`--vram`)."""

from .peaks import Work, predicted_peak
from .plan import Plan
from .planning import HOST_BYTES, host_has_room, plan_tuning

__all__ = ["HOST_BYTES", "Plan", "Work", "host_has_room", "plan_tuning", "predicted_peak"]
