"""Options that several commands share, each written once.

``None`` means "as the library, the base or the domain says": no number is written twice.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def complete_domain(incomplete: str) -> list[str]:
    """Names for the shell's completion; imports no domain, however slow or broken."""
    from e4t_cli.registry.discovery import domain_names

    return [name for name in domain_names() if name.startswith(incomplete)]


PICTURES, DRAWING, TUNING, OUTPUT = "Pictures", "SamplingConfig", "Trainer", "Output"
NETWORK, PHOTO = "Network", "Photo"

DomainName = Annotated[
    str,
    typer.Argument(metavar="DOMAIN", autocompletion=complete_domain,
                   help="What kind of thing it is: see `e4t domains list`."),
]  # fmt: skip
Photo = Annotated[str, typer.Argument(metavar="IMAGE", help="The one photo: a file, or -.")]
Prompts = Annotated[
    list[str] | None,
    typer.Argument(metavar="PROMPT...",
                   help="Quoted sentences with S* where the concept goes; - reads lines of stdin."),
]  # fmt: skip

PromptsFile = Annotated[
    str | None,
    typer.Option("-f", "--prompts-file", metavar="FILE", rich_help_panel=PICTURES,
                 help="More prompts, one a line; - for stdin."),
]  # fmt: skip
NumImages = Annotated[
    int,
    typer.Option(
        "-n", "--num-images", min=1, rich_help_panel=PICTURES, help="Pictures per prompt."
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(min=0, max=2**32 - 1, rich_help_panel=PICTURES,
                 help="Picture i of a prompt uses SEED + i. Not given: random, and reported."),
]  # fmt: skip
Placeholder = Annotated[
    str,
    typer.Option(rich_help_panel=PICTURES, help="Another word for the concept, such as '<me>'."),
]
Base = Annotated[
    str,
    typer.Option(rich_help_panel=PICTURES,
                 help="auto, mini, sd14, sd15, sd21-base, sd21, OWNER/NAME of the hub, a folder."),
]  # fmt: skip

Steps = Annotated[
    int | None,
    typer.Option(min=1, rich_help_panel=DRAWING, help="Denoising steps of each picture."),
]
Guidance = Annotated[
    float | None,
    typer.Option(min=0.0, rich_help_panel=DRAWING, help="How strictly the prompt is followed."),
]
Scheduler = Annotated[
    str | None,
    typer.Option(rich_help_panel=DRAWING, help="dpm++, ddim, euler and other samplers."),
]
NegativePrompt = Annotated[
    str | None,
    typer.Option(rich_help_panel=DRAWING, help="What the pictures should not show."),
]

ConceptScale = Annotated[
    float | None,
    typer.Option(min=0.0, max=2.0, rich_help_panel=DRAWING, show_default=False,
                 help="How much of what was learned is drawn; less leaves the prompt more room."),
]  # fmt: skip

TuneSteps = Annotated[
    int | None,
    typer.Option(min=0, rich_help_panel=TUNING,
                 help="Tuning steps on the photo; 0 keeps the encoder's first guess."),
]  # fmt: skip
Tuning = Annotated[
    str | None,
    typer.Option(metavar="full|lora", rich_help_panel=TUNING,
                 help="Every weight, as the paper does, or LoRA: less memory, small concepts."),
]  # fmt: skip
Vram = Annotated[
    str,
    typer.Option(envvar="E4T_VRAM", metavar="GB|auto", rich_help_panel=TUNING,
                 help="Memory to keep within: 6, 8, 12 … or auto for what is free."),
]  # fmt: skip
NoSafetyChecker = Annotated[
    bool,
    typer.Option("--no-safety-checker", rich_help_panel=OUTPUT,
                 help="Keep pictures that the base's safety checker would withhold."),
]  # fmt: skip
Mask = Annotated[
    str,
    typer.Option(metavar="FILE|auto|none|words:...", rich_help_panel=PHOTO,
                 help="Which part of the photo is the concept: a file is white there; "
                      "'words:a cat' looks for that; auto is the domain's way."),
]  # fmt: skip
Face = Annotated[
    str,
    typer.Option("--face", metavar="largest|left|right|N", rich_help_panel=PHOTO,
                 help="Which of several faces; 1 is the leftmost."),
]  # fmt: skip
NoAlign = Annotated[
    bool,
    typer.Option("--no-align", rich_help_panel=PHOTO,
                 help="Take the centred square; do not turn and crop the photo around the face."),
]  # fmt: skip
RequireFace = Annotated[
    bool,
    typer.Option("--require-face", rich_help_panel=PHOTO,
                 help="End with code 3 if there is no face, instead of going on without a mask."),
]  # fmt: skip
Device = Annotated[
    str,
    typer.Option(envvar="E4T_DEVICE", rich_help_panel=TUNING, help="auto, cpu, cuda, cuda:1, mps."),
]
Dtype = Annotated[
    str,
    typer.Option(envvar="E4T_DTYPE", rich_help_panel=TUNING, help="auto, fp32, bf16 or fp16."),
]


def _go_offline(offline: bool) -> bool:
    """Tell the libraries below as well, which read it when they are first imported."""
    if offline:
        from e4t_cli.hub.paths import go_offline

        go_offline()
    return offline


Offline = Annotated[
    bool,
    typer.Option("--offline", envvar="E4T_OFFLINE", callback=_go_offline, rich_help_panel=NETWORK,
                 help="Use what is on this machine, and open no connection."),
]  # fmt: skip
AcceptLicense = Annotated[
    bool,
    typer.Option("--accept-license", rich_help_panel=NETWORK,
                 help="Accept the licences of what has to be fetched; remembered."),
]  # fmt: skip

Out = Annotated[
    Path,
    typer.Option("-o", "--out", metavar="DIR", rich_help_panel=OUTPUT,
                 help="Folder for the pictures; nothing in it is ever overwritten."),
]  # fmt: skip
Grid = Annotated[
    bool,
    typer.Option("--grid", rich_help_panel=OUTPUT,
                 help="Also a captioned contact sheet, the photo first."),
]  # fmt: skip
NoMetadata = Annotated[
    bool,
    typer.Option("--no-metadata", rich_help_panel=OUTPUT,
                 help="Keep prompts and settings out of the files; the AI mark stays."),
]  # fmt: skip
Json = Annotated[
    bool,
    typer.Option("--json", rich_help_panel=OUTPUT, help="One JSON object a line on stdout."),
]
Yes = Annotated[
    bool, typer.Option("-y", "--yes", rich_help_panel=OUTPUT, help="Do not ask; do it.")
]
Quiet = Annotated[
    bool,
    typer.Option("-q", "--quiet", rich_help_panel=OUTPUT, help="Nothing on stderr but errors."),
]
Verbose = Annotated[
    int,
    typer.Option("-v", "--verbose", count=True, rich_help_panel=OUTPUT,
                 help="More on stderr; -vv also shows tracebacks."),
]  # fmt: skip
