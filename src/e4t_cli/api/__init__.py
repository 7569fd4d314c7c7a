"""The library: names and paths in, results out. Nothing here prints, and nothing exits."""

from e4t_cli.api.dry_run import plan_pretraining
from e4t_cli.api.exporting import export
from e4t_cli.api.personalization import generate, personalize, plan
from e4t_cli.api.preprocessing import prepare
from e4t_cli.api.pretraining import pretrain

__all__ = ["export", "generate", "personalize", "plan", "prepare", "pretrain", "plan_pretraining"]
