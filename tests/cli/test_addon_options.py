"""`--lora`, `--embedding`, `--vae`: what a concept was made on, what its pictures say, and drawing them again."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import e4t_cli
from e4t_cli.errors import UsageError
from e4t_cli.formats.concept import Concept
from e4t_cli.formats.lora import kohya_name
from e4t_cli.images.png_metadata import read_metadata
from e4t_cli.models.text_to_image import TextToImageModel
from e4t_cli.registry.discovery import user_domains_folder

QUERY = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture
def files(world, tmp_path):
    """A LoRA, an embedding, a VAE, and the domain where concepts look for it."""
    shutil.copytree(world.pack, user_domains_folder() / "my_faces")
    source, name = torch.Generator().manual_seed(2), kohya_name("unet", QUERY)
    up, down = torch.randn(64, 2, generator=source), torch.randn(2, 64, generator=source)
    save_file({f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}, tmp_path / "style.safetensors")
    save_file({"emb_params": torch.randn(2, 24, generator=source)}, tmp_path / "neg.safetensors")
    vae = TextToImageModel.load(world.base).vae.state_dict()
    vae["decoder.conv_out.bias"] = vae["decoder.conv_out.bias"] + 0.2
    save_file(vae, tmp_path / "soft.safetensors")
    return tmp_path


ALL = ("--lora", "style.safetensors:0.5", "--embedding", "neg.safetensors:bad", "--vae", "soft.safetensors")
LORA_AND_VAE = (*ALL[:2], *ALL[4:])


def pixels(path):
    with Image.open(path) as image:
        return image.convert("RGB").tobytes()


def told(path):
    return read_metadata(path.read_bytes() if hasattr(path, "read_bytes") else open(path, "rb").read())


def test_a_concept_its_pictures_and_the_same_again(run, world, files):
    plain = run(*world.personalize("--seed", "3", "-o", "plain.png"))
    ended = run(*world.personalize("--seed", "3", "--save", "me.e4t", "--negative-prompt", "bad, red", *ALL))
    assert ended.code == 0, ended.err
    assert "LoRA style:0.5: layers: 1 U-Net" in ended.err and "no prompt has" not in ended.err
    picture = ended.lines[1]
    assert pixels(picture) != pixels(plain.lines[0])
    about = told(picture)
    style, word, vae = about.details["addons"]
    assert (style["name"], style["scale"], word["word"], vae["name"]) == ("style", 0.5, "bad", "soft.safetensors")
    first, *_, settings = about.parameters.split("\n")
    assert first == "S* on the beach <lora:style:0.5>"
    for part in (f'Lora hashes: "style: {style["sha256"][:12]}"', f'TI hashes: "bad: {word["sha256"][:12]}"'):
        assert part in settings
    assert f"VAE hash: {vae['sha256'][:10]}, VAE: soft.safetensors" in settings
    assert "addons" not in told(plain.lines[0]).details and "hashes" not in told(plain.lines[0]).parameters
    assert [one.kind for one in Concept.load("me.e4t").addons] == ["lora", "vae"]

    assert f"the LoRA style:0.5 [{style['sha256'][:12]}]" in run("info", "me.e4t", picture).out

    same = ["--base", str(world.base)]
    again = run("generate", "me.e4t", "--like", picture, *same, *ALL, "-o", "again.png")
    assert again.code == 0, again.err
    assert pixels("again.png") == pixels(picture) and "the picture was made" not in again.err
    # A renamed file with another description is the same.
    (files / "style.safetensors").rename(files / "renamed.safetensors")
    renamed = run(
        "generate", "me.e4t", "--like", picture, *same, "--lora", "renamed.safetensors:0.5", *ALL[2:], "-o", "b.png"
    )
    assert renamed.code == 0 and pixels("b.png") == pixels(picture)


def test_another_base_than_the_concept_was_made_on(run, world, files):
    made = run(*world.personalize("--save", "me.e4t", "--seed", "1", *ALL, "--negative-prompt", "bad"))
    assert made.code == 0
    picture, same = made.lines[1], ["S* on the beach", "--base", str(world.base), "--steps", "1"]
    for dry in ([], ["--dry-run"]):
        ended = run("generate", "me.e4t", *same, *dry)
        assert ended.code == 5 and "which is not given" in ended.err and ended.out == ""
        assert "add --lora style.safetensors:0.5 --vae soft.safetensors" in ended.err
        ended = run("generate", "me.e4t", *same, *dry, "--lora", "style.safetensors", *ALL[4:])
        assert ended.code == 5 and "the LoRA style:0.5 [" in ended.err and "not with the LoRA style:1 [" in ended.err
        # Words are no part of a concept, but a picture to be drawn again needs them.
        assert run("generate", "me.e4t", *same, *dry, *LORA_AND_VAE).code == 0
        ended = run("generate", "me.e4t", "--like", picture, *same[1:], *dry, *LORA_AND_VAE)
        assert ended.code == 2 and "was drawn with the embedding neg (bad) [" in ended.err
        assert "add --embedding neg.safetensors:bad" in ended.err
    plain = run(*world.personalize("--save", "plain.e4t", "--seed", "1", prompts=()))
    assert plain.code == 0
    ended = run("generate", "plain.e4t", *same, *ALL[:2])
    assert ended.code == 5 and "was made without the LoRA style:0.5" in ended.err
    other = run("generate", "plain.e4t", "--like", picture, *same[1:], *ALL[2:4])
    assert other.code == 0 and "another concept (LoRAs or VAE" in other.err


def test_wrong_files_leave_nothing_behind(run, world, files):
    (files / "x.pt").write_bytes(b"PK\x03\x04")
    before = sorted(files.rglob("*"))
    for option, value, code, words in (
        ("--lora", "neg.safetensors", 5, "is a textual inversion, not a LoRA; give it as --embedding"),
        ("--embedding", "style.safetensors", 5, "is a LoRA, not a textual inversion"),
        ("--vae", "style.safetensors", 5, "is a LoRA, not a VAE"),
        ("--embedding", "x.pt", 5, "is a pickle"),
        ("--lora", "missing.safetensors", 2, "no file missing.safetensors"),
        ("--lora", "style.safetensors:strong", 2, "is no scale"),
    ):
        for dry in ([], ["--dry-run"]):
            ended = run(*world.personalize(option, value, "--save", "me.e4t", *dry))
            assert (ended.code, ended.out) == (code, ""), ended.err
            assert words.partition("; ")[0] in ended.err and "Traceback" not in ended.err
            assert words.partition("; ")[2] in ended.err
    assert [one for one in sorted(files.rglob("*")) if one.name != "outputs"] == before


def test_words_that_cannot_be(run, world, files):
    for word, words in (("photo", "prompts that a concept is tuned with"), ("S*", "is the concept")):
        ended = run(*world.personalize("--embedding", f"neg.safetensors:{word}"))
        assert ended.code == 2 and words in ended.err, ended.err
    unread = run(*world.personalize("--embedding", "neg.safetensors:bad", "--seed", "1"))
    assert unread.code == 0 and "no prompt has the word of the embedding: bad" in unread.err


def test_an_export_has_the_lora_in_it(run, world, files):
    assert run(*world.personalize("--save", "me.e4t", "--seed", "1", *LORA_AND_VAE, prompts=())).code == 0
    refused = run("export", "me.e4t", "model", "--base", str(world.base))
    assert refused.code == 5 and not (files / "model").exists()
    assert "add --base-lora style.safetensors:0.5 --vae" in refused.err
    wrong = ("export", "me.e4t", "model", "--base", str(world.base), "--base-lora")
    for file, hint in (("style.safetensors:x", "--base-lora style.safetensors:0.8"), ("", "--base-lora has an empty")):
        refused = run(*wrong, file)
        assert refused.code == 2 and hint in refused.err and " --lora" not in refused.err
    given = ["--base", str(world.base), "--base-lora", "style.safetensors:0.5", "--vae", "soft.safetensors"]
    made = run("export", "me.e4t", "model", *given)
    assert made.code == 0, made.err
    exported = TextToImageModel.load(world.base)
    from safetensors.torch import load_file

    weights = load_file(files / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    change = weights[f"{QUERY}.weight"].float() - exported.unet.get_submodule(QUERY).weight
    assert change.abs().max() > 0.1  # of the LoRA: tuning changes less
    vae = load_file(files / "model" / "vae" / "diffusion_pytorch_model.safetensors")
    assert (vae["decoder.conv_out.bias"].float() - exported.vae.decoder.conv_out.bias).min() > 0.1
    lora = run("export", "me.e4t", "me.safetensors", "--lora", "2", *given)
    assert lora.code == 0 and "added to the base with the LoRA style:0.5" in lora.err


def test_in_python(world, files):
    addons = e4t_cli.BaseAddons.parse(loras=[str(files / "style.safetensors")])
    model = TextToImageModel.load(world.base)
    with pytest.raises(UsageError, match="a loaded model may be in use"):
        e4t_cli.personalize(world.pack, world.photo, base=model, addons=addons)
    with pytest.raises(UsageError, match="the weights of a domain are made for a base without"):
        e4t_cli.pretrain("mine", [Image.new("RGB", (64, 64))], base=world.base, addons=addons)
    json.dumps([one.as_dict() for one in addons.check()])
