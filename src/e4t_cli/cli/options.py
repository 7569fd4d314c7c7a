"""Options that several commands share, in groups that commands take as values.

`None` stands for the default of the library, the base or the domain: no default is written twice.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from e4t_cli.cli import console
from e4t_cli.devices import DTYPES
from e4t_cli.errors import UsageError, printable
from e4t_cli.hub.addons import BaseAddons
from e4t_cli.progress import ProgressCallback
from e4t_cli.schedulers import NAMES, SCHEDULERS
from e4t_cli.threads import Load, set_threads

if TYPE_CHECKING:
    from e4t_cli.api.options import (
        ConceptCallback,
        GenerateKeywords,
        ImageCallback,
        PersonalizeKeywords,
        PhotoKeywords,
        PreparedCallback,
        RunKeywords,
    )

STARTED = Load.read()  # the load from here on says which cores are free
MAX_SEED = 2**32 - 1
MAX_SEEDS = 10_000  # of one range; more is a slip of the finger

# Options, by their panel of the help.
images_option = functools.partial(typer.Option, rich_help_panel="Images")
sampling_option = functools.partial(typer.Option, rich_help_panel="Sampling")
tuning_option = functools.partial(typer.Option, rich_help_panel="Tuning")
photo_option = functools.partial(typer.Option, rich_help_panel="Photo")
device_option = functools.partial(typer.Option, rich_help_panel="Device")
network_option = functools.partial(typer.Option, rich_help_panel="Network")
output_option = functools.partial(typer.Option, rich_help_panel="Output")


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command take option groups: dataclasses whose fields become its options.

    Typer has no groups, it makes one option of each parameter; so the command gets a signature in
    which the fields of each group stand in place of the group.
    """
    hints = get_type_hints(command, include_extras=True)
    groups = {name: kind for name, kind in hints.items() if isinstance(kind, type) and is_dataclass(kind)}
    parameters = []
    for name, parameter in inspect.signature(command).parameters.items():
        one = parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[name])
        if name not in groups:
            parameters.append(one)
            continue
        types = get_type_hints(groups[name], include_extras=True)
        for field in fields(groups[name]):
            parameters.append(one.replace(name=field.name, default=field.default, annotation=types[field.name]))

    @functools.wraps(command)
    def run(**given: Any) -> None:
        values = {
            name: group(**{one.name: given.pop(one.name) for one in fields(group)}) for name, group in groups.items()
        }
        command(**given, **values)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined] # PEP 362
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    return run


def complete_domain(incomplete: str) -> list[str]:
    """Names for the shell's completion; imports no domain, however slow or broken."""
    from e4t_cli.registry.discovery import domain_names

    return [name for name in domain_names() if name.startswith(incomplete)]


def complete_base(incomplete: str) -> list[str]:
    """Names of bases, for the shell's completion."""
    from e4t_cli.hub.bases import EMBEDDED, PUBLISHED

    return [name for name in ("auto", *EMBEDDED, *PUBLISHED) if name.startswith(incomplete)]


def completes(*words: str) -> Callable[[str], list[str]]:
    """Return a function that completes one of a few words."""
    return lambda incomplete: [word for word in words if word.startswith(incomplete)]


def _go_offline(offline: bool) -> bool:
    """Set the environment too: the libraries read it at their first import."""
    if offline:
        from e4t_cli.hub.paths import go_offline

        go_offline()
    return offline


def _set_threads(context: typer.Context, threads: int) -> int:
    """Set the number of threads before torch is imported; a command of hours does not go by the load of a moment."""
    if not context.resilient_parsing:
        set_threads(threads, None if context.info_name in ("pretrain", "batch") else STARTED)
    return threads


# fmt: off
DomainName = Annotated[str, typer.Argument(
    metavar="DOMAIN", autocompletion=complete_domain, help="A name of `e4t domains list`.")]
Placeholder = Annotated[str, images_option(
    metavar="WORD", help="What prompts call it, such as '<me>'.")]
Device = Annotated[str, device_option(
    metavar="NAME", envvar="E4T_DEVICE", autocompletion=completes("auto", "cpu", "cuda", "cuda:0", "cuda:1", "mps"),
    help="auto, cpu, cuda, cuda:1, mps.")]
Dtype = Annotated[str, device_option(
    metavar="NAME", envvar="E4T_DTYPE", autocompletion=completes("auto", *DTYPES), help="auto, fp32, bf16 or fp16.")]
Vram = Annotated[str, device_option(
    envvar="E4T_VRAM", metavar="GB|auto", help="Memory limit: 6, 8, 12, … or auto.")]
Vae = Annotated[str | None, images_option(
    metavar="VAE", help="Instead of the base's VAE: a .safetensors, a folder of diffusers, or OWNER/NAME of the hub.")]
Threads = Annotated[int, device_option(
    metavar="N", envvar="E4T_THREADS", min=0, show_default=False, is_eager=True, callback=_set_threads,
    help="CPU threads; default: the cores that are free.")]
Offline = Annotated[bool, network_option(
    "--offline", envvar="E4T_OFFLINE", callback=_go_offline,
    help="Open no connection; use what is on this machine.")]
AcceptLicence = Annotated[bool, network_option(
    "--accept-license", help="Accept the licences of what is downloaded.")]
Json = Annotated[bool, output_option("--json", help="One JSON object a line on stdout.")]
Yes = Annotated[bool, output_option("-y", "--yes", help="Do not ask.")]
Force = Annotated[bool, output_option("--force", help="Replace what e4t wrote there before.")]
Quiet = Annotated[bool, output_option("-q", "--quiet", help="Only errors on stderr.")]


@dataclass(frozen=True, kw_only=True)
class TerminalFlags:
    """How much a command prints, and in which form."""

    json: Json = False
    quiet: Quiet = False
    verbose: Annotated[int, output_option(
        "-v", "--verbose", count=True, metavar="", show_default=False,
        help="More on stderr; -vv also shows tracebacks.")] = 0

    def start(self, *, quiet: bool = False) -> console.Console:
        """Return the console of the command."""
        return console.start(json=self.json, quiet=quiet or self.quiet, verbose=self.verbose)


@dataclass(frozen=True, kw_only=True)
class RunFlags:
    """The base, the device and the network: `api.options.RunOptions`."""

    base: Annotated[str, images_option(
        metavar="BASE", autocompletion=complete_base,
        help="auto, mini, sd14, sd15, sd21-base, sd21, OWNER/NAME of the hub, a folder, a .safetensors.")] = "auto"
    device: Device = "auto"
    dtype: Dtype = "auto"
    threads: Threads = 0
    offline: Offline = False
    accept_license: AcceptLicence = False

    def run_keywords(self, terminal: console.Console, on_progress: ProgressCallback | None = None) -> RunKeywords:
        """Return the keywords of the library; the user is asked at the terminal, if at all."""
        return {
            "base": self.base, "device": self.device, "dtype": self.dtype, "offline": self.offline,
            "accept_license": terminal.consent(self.accept_license), "on_progress": on_progress,
        }


@dataclass(frozen=True, kw_only=True)
class PromptFlags:
    """What is generated, and how often."""

    prompts: Annotated[list[str] | None, typer.Argument(
        metavar="PROMPT", help="In quotes; S* is the concept, - is stdin.")] = None
    prompts_file: Annotated[str | None, images_option(
        "-f", "--prompts-file", metavar="FILE", help="More prompts, one a line; - is stdin.")] = None
    num_images: Annotated[int, images_option(
        "-n", "--num-images", metavar="N", min=1, help="Images per prompt.")] = 1
    seed: Annotated[str | None, images_option(
        metavar="SEED", show_default=False,
        help="Of the first image of a prompt, then SEED + 1, …; 1,4-8 lists the seed of every image. Default: random.")
    ] = None

    def seeds(self) -> int | list[int] | None:
        """Return the seed, or the list of seeds; raises UsageError if it is neither."""
        if self.seed is None:
            return None
        found: list[int] = []
        for part in self.seed.split(","):
            match = re.fullmatch(r"\s*([0-9]{1,10})\s*(?:-\s*([0-9]{1,10})\s*)?", part, re.ASCII)
            first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
            if not first <= last <= MAX_SEED or last - first >= MAX_SEEDS:
                given = printable(self.seed, limit=40)
                message = f"{given!r} is no seed: a seed is a whole number from 0 to {MAX_SEED}"
                raise UsageError(message, hint="--seed 7, --seed 1,4,9 or --seed 1-8")
            found += range(first, last + 1)
        return found if len(found) > 1 else found[0]


@dataclass(frozen=True, kw_only=True)
class SamplingFlags:
    """Fields of `SamplingConfig`."""

    steps: Annotated[int | None, sampling_option(metavar="N", min=1, help="Denoising steps of each image.")] = None
    guidance: Annotated[float | None, sampling_option(
        metavar="X", min=0.0, help="Scale of classifier-free guidance.")] = None
    scheduler: Annotated[str | None, sampling_option(
        metavar="NAME", autocompletion=completes(*NAMES),
        help=f"{', '.join(SCHEDULERS)}, or a class of diffusers.")] = None
    negative_prompt: Annotated[str | None, sampling_option(
        metavar="TEXT", help="What the images should not show.")] = None
    concept_scale: Annotated[float | None, sampling_option(
        metavar="X", min=0.0, max=2.0, show_default=False,
        help="Weight of what was learned, default 1; less follows the prompt more.")] = None
    prompt_weights: Annotated[bool | None, sampling_option(
        "--prompt-weights", metavar="", help="Read (word:1.2) and ((word)) as weights of words.")] = None

    def given(self) -> dict[str, Any]:
        """Return the fields that were given."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class GenerateFlags(RunFlags):
    """`api.options.GenerateOptions`."""

    lora: Annotated[list[str] | None, images_option(
        metavar="FILE[:SCALE]", help="Merge a LoRA into the base; several if repeated.")] = None
    embedding: Annotated[list[str] | None, images_option(
        metavar="FILE[:WORD]",
        help="A textual inversion: a word of prompts and negative prompts; several if repeated.")] = None
    vae: Vae = None
    vram: Vram = "auto"
    no_safety_checker: Annotated[bool, output_option(
        "--no-safety-checker", help="Keep images that the checker would withhold.")] = False

    def generate_keywords(
        self, terminal: console.Console, on_progress: ProgressCallback | None = None,
        on_image: ImageCallback | None = None,
    ) -> GenerateKeywords:
        """Return the keywords of the library."""
        run, checker = self.run_keywords(terminal, on_progress), not self.no_safety_checker
        run["addons"] = BaseAddons.parse(loras=self.lora or (), embeddings=self.embedding or (), vae=self.vae)
        return {**run, "vram": self.vram, "safety_checker": checker, "on_image": on_image}


@dataclass(frozen=True, kw_only=True)
class PersonalizeFlags(GenerateFlags):
    """`api.options.PersonalizeOptions`."""

    tuning: Annotated[str | None, tuning_option(
        metavar="full|lora", autocompletion=completes("full", "lora"),
        help="All weights, as in the paper, or LoRA: less memory, small files.")] = None
    tune_steps: Annotated[int | None, tuning_option(
        metavar="N", min=0, help="Tuning steps on the photo; 0: the encoder's prediction.")] = None
    keep_weights: Annotated[bool, output_option(
        "--keep-weights", help="With --save: the tuned weights too, a large file.")] = False
    domain_base: Annotated[str | None, images_option(
        metavar="NAME", autocompletion=complete_base,
        help="Take the domain's weights for this base, as sd14, on another base of the same shapes.")] = None
    mask: Annotated[list[str] | None, photo_option(
        metavar="MASK", help="The part of the photo that counts: auto (the default), none, a FILE that is white "
        "there, 'words:a cat', or face-ellipse. Repeated: one for each photo.")] = None
    face: Annotated[str, photo_option(
        metavar="WHICH",
        help="Of several in one photo: largest, left, right, center, or a number from the left (`e4t faces`).")
    ] = "largest"
    no_align: Annotated[bool, photo_option(
        "--no-align", help="Use the centre square; do not rotate and crop around the face.")] = False
    require_face: Annotated[bool, photo_option(
        "--require-face", help="End with code 3 if there is no face.")] = False
    strict: Annotated[bool, photo_option(
        "--strict", help="End with code 3 where a note would cast doubt on the photo.")] = False

    def photo_keywords(self) -> PhotoKeywords:
        """Return the keywords of `api.options.PhotoOptions`."""
        align = not self.no_align
        return {
            "mask": self.mask or "auto", "align": align, "face": self.face, "require_face": self.require_face,
            "strict": self.strict,
        }

    def personalize_keywords(
        self, generating: GenerateKeywords, on_prepared: PreparedCallback | None, on_concept: ConceptCallback | None
    ) -> PersonalizeKeywords:
        """Return the keywords of the library."""
        return {
            **generating, **self.photo_keywords(), "tuning": self.tuning, "tune_steps": self.tune_steps,
            "keep_weights": self.keep_weights, "domain_base": self.domain_base,
            "on_prepared": on_prepared, "on_concept": on_concept,
        }


@dataclass(frozen=True, kw_only=True)
class OutputFlags:
    """Where images go, and what is beside them."""

    out: Annotated[Path, output_option(
        "-o", "--out", metavar="PATH", help="Folder for the images, or FILE.png for the only one.")] = Path("outputs")
    name: Annotated[str | None, output_option(
        metavar="NAME", help="Beginning of the images' names, in place of the photo's.")] = None
    force: Force = False
    grid: Annotated[bool, output_option("--grid", help="Also a captioned contact sheet, the photo first.")] = False
    no_metadata: Annotated[bool, output_option(
        "--no-metadata", help="Leave all but the AI mark out of the files.")] = False
    dry_run: Annotated[bool, output_option(
        "--dry-run", help="Check everything, print the cost, and end.")] = False


@dataclass(frozen=True, kw_only=True)
class PersonalizeOutputFlags(OutputFlags):
    """What `personalize` saves beside images."""

    save: Annotated[Path | None, output_option(
        metavar="FILE.e4t", help="Save the concept, for `e4t generate`.")] = None
    save_prepared: Annotated[Path | None, photo_option(
        metavar="PATH",
        help="Save the cropped photo and its mask; without prompts, only that.")] = None
