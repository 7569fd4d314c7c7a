"""``e4t export`` and ``e4t import``: concepts for other programs, and weights from them."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from e4t_cli.cli import options
from e4t_cli.cli.console import show_help
from e4t_cli.cli.personalize import OwnPlaceholder, Saved, check_concept
from e4t_cli.errors import E4TError, UsageError, printable
from e4t_cli.hub.addons import BaseAddons

if TYPE_CHECKING:
    from e4t_cli.api.options import ImportKeywords

IMPORT_EXAMPLES = """
Examples:\n
e4t import e4t-diffusion ./my-checkpoint --name my_dogs --base sd14\n
e4t personalize my_dogs rex.jpg "S* on the beach" --base sd14\n
e4t import e4t-diffusion ./tuned-on-rex --save rex.e4t
"""

app = typer.Typer(help="Use weights that another program trained.")

Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="It has config.json, encoder.pt and the weights.")]
Save = Annotated[Path | None, typer.Option("--save", metavar="FILE.e4t", help="Make a concept of a tuned checkpoint.")]
Photo = Annotated[
    str | None, typer.Option("--image", metavar="FILE", help="The photo it was tuned on, if not in FOLDER.")
]


@app.callback(invoke_without_command=True)
def weights(context: typer.Context) -> None:
    """Use weights that another program trained."""
    show_help(context)


# fmt: off
@dataclass(frozen=True, kw_only=True)
class ImportFlags:
    """`api.options.ImportOptions`."""

    name: Annotated[str | None, typer.Option(
        metavar="NAME", help="Of the domain; default: by its descriptor.")] = None
    base: Annotated[str, typer.Option(
        "--base", metavar="BASE", autocompletion=options.complete_base,
        help="What it was trained on; auto: see its config.")] = "auto"
    licence: Annotated[str, typer.Option(
        metavar="TEXT", show_default=False, help="Of the weights, for the domain's manifest.")] = ""
    normalised_patches: Annotated[bool, typer.Option(
        "--normalised-patches", help="Of checkpoints trained with open_clip from 2024 on.")] = False
    device: options.Device = "auto"
    dtype: options.Dtype = "auto"
    force: options.Force = False
# fmt: on


@app.command("e4t-diffusion", epilog=IMPORT_EXAMPLES)
@options.grouped
def e4t_diffusion(
    folder: Folder, flags: ImportFlags, terminal: options.TerminalFlags, save: Save = None, image: Photo = None
) -> None:
    """Make a domain of a checkpoint of mkshing/e4t-diffusion.

    Its files are pickles: they are read once, with torch's restricted loader, by a process that has no network, and
    kept as safetensors. The domain's folder goes to stdout, with --save the concept's file instead.
    """
    console = terminal.start()
    if image is not None and save is None:
        raise UsageError("--image is for a tuned checkpoint's concept", hint="add --save me.e4t")
    from e4t_cli.api import importing

    with console.progress() as on_progress:
        asked: ImportKeywords = {
            "name": flags.name, "base": flags.base, "licence": flags.licence, "device": flags.device,
            "dtype": flags.dtype, "normalised_patches": flags.normalised_patches, "force": flags.force,
            "on_progress": on_progress,
        }  # fmt: skip
        if save is None:
            made = importing.import_checkpoint(folder, **asked)
        else:
            made = importing.import_concept(folder, save, image=image, **asked)
    console.note(made.summary)
    if save is None:
        path = str(made.folder)
        console.product(path, {"type": "domain", "name": made.name, "base": made.base, "path": path})
        console.note(f'try it: e4t personalize {made.name} PHOTO "S* on the beach" --base {made.base}')
    else:
        console.product(str(save), {"type": "concept", "name": made.name, "path": str(save)})
        console.note(f'try it: e4t generate {save} "S* on the beach"')


EXAMPLES = """
Examples:\n
e4t export me.e4t ./me-model\n
e4t export me.e4t ./me.safetensors\n
e4t export me.e4t ./me-lora.safetensors --lora 64
"""

Target = Annotated[Path, typer.Argument(metavar="TARGET", help="A new folder, or FILE.safetensors.")]
Lora = Annotated[int | None, typer.Option(
    metavar="RANK", min=1, max=1024, show_default=False,
    help="Write only what was learned, as a LoRA of this rank.")]  # fmt: skip

BaseLora = Annotated[list[str] | None, options.images_option(
    metavar="FILE[:SCALE]", help="A LoRA that the concept was made with; several if repeated.")]  # fmt: skip

Word = Annotated[str, typer.Option(
    "--word", metavar="WHERE", autocompletion=lambda: ["included", "separate"],
    help="Of a folder: included in its vocabulary, or separate.")]  # fmt: skip


_OTHER_COMMANDS = re.compile(r"--lora(?! \d+$)")  # with a number alone it is this command's rank


@contextlib.contextmanager
def _naming_base_lora() -> Iterator[None]:
    """Let errors name the option for a LoRA of the base as it is called here: `--lora` is the rank of the export."""
    try:
        yield
    except E4TError as error:
        message, hint = (_OTHER_COMMANDS.sub("--base-lora", text) for text in (error.message, error.hint or ""))
        raise type(error)(message, hint=hint or None) from error


@options.grouped
def export(
    concept: Saved, path: Target, run: options.RunFlags, terminal: options.TerminalFlags, lora: Lora = None,
    placeholder: OwnPlaceholder = None, word: Word = "included", vram: options.Vram = "auto",
    base_lora: BaseLora = None, vae: options.Vae = None, force: options.Force = False,
) -> None:  # fmt: skip
    """Write a saved concept as a model for other programs.

    A folder is for diffusers: the tuned model, with one more word in its vocabulary, which is the
    concept. ComfyUI and stable-diffusion.cpp read it with --word separate. FILE.safetensors is for
    programs that read checkpoints of Stable Diffusion 1.x: the tuned model, and the word in a
    second file, for their embeddings. With --lora it is a small file for use with the base.

    The word's embedding is the same at every denoising step, where e4t predicts it anew at each.
    Whoever gets the model can generate the concept: share it as you would share the photo.
    """
    console = terminal.start()
    check_concept(concept)
    from e4t_cli.api import exporting

    with console.progress() as on_progress:
        asked = run.run_keywords(console, on_progress)
        with _naming_base_lora():
            asked["addons"] = BaseAddons.parse(loras=base_lora or (), vae=vae)
            made = exporting.export(
                concept, path, lora=lora, placeholder=placeholder, word=word, vram=vram, force=force, **asked
            )  # fmt: skip
    record: dict[str, str | float] = {
        "type": "model" if lora is None else "lora", "path": str(made.path), "token": made.token,
        "variation": round(made.variation, 4), "retained_energy": round(made.retained_energy, 4),
    }  # fmt: skip
    console.product(str(made.path), record)
    if lora is not None:
        console.note(f"rank {lora} holds {made.retained_energy:.0%} of what tuning changed")
    left_out = f"{made.variation:.0%} of the word changes with the noise level, and is left out"
    if path.suffix == ".safetensors" or word == "separate":
        token = printable(made.token)
        console.note(f"in prompts it is {token}, in ComfyUI embedding:{token}; {left_out}")
        console.note(f"put {token}.safetensors where the other program keeps embeddings")
    else:
        console.note(f"in prompts it is {printable(made.token)}; {left_out}")
        console.note("the folder is for diffusers; ComfyUI and stable-diffusion.cpp need --word separate")
