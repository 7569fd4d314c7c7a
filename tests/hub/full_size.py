"""A rehearsal at full size: Stable Diffusion 1.4 with random weights on the fake hub.

    python -m tests.hub.full_size FOLDER [--faces] -- personalize face examples/me.png … --base sd14

makes the files of `sd14`, its image tower and a face parser in FOLDER/published (4 GB, once),
serves them, the first two at the pinned commits, and runs the command with caches in FOLDER/caches.
With --faces a checkpoint like the public face weights (another 4 GB) is made and served too. The
architectures are exact and the weights are noise, so the generated image is noise;
everything on the way is real.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.hub.fake_hub import FakeHub

FACES = "mkshing/e4t-diffusion-ffhq-celebahq-v1"
PARSER = "jonathandinu/face-parsing"
DETECTOR = "opencv/face_detection_yunet"
PARTS = (
    "background", "skin", "nose", "eye_g", "l_eye", "r_eye", "l_brow", "r_brow", "l_ear", "r_ear",
    "mouth", "u_lip", "l_lip", "hair", "hat", "ear_r", "neck_l", "neck", "cloth",
)  # fmt: skip
_BLOCK = 1 << 22  # values at a time


def write_noise(state: Mapping[str, Any], path: Path) -> None:
    """Write a safetensors file in float16 with the names and shapes of tensors, a block at a time.

    Matrices are small noise and scales are ones, so that activations stay finite.
    """
    import numpy

    header, offset = {}, 0
    state = {key: value for key, value in state.items() if not key.endswith("position_ids")}
    for key, value in state.items():
        size = 2 * value.numel()
        place = [offset, offset + size]
        header[key] = {"dtype": "F16", "shape": list(value.shape), "data_offsets": place}
        offset += size
    text = json.dumps(header).encode()
    source = numpy.random.default_rng(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    making = path.with_suffix(".making")
    with making.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key, value in state.items():
            count = value.numel()
            if value.dim() < 2:
                fill = 0 if key.endswith("bias") else 1
                file.write(numpy.full(count, fill, dtype=numpy.float16).tobytes())
                continue
            scale = value[0].numel() ** -0.5
            for start in range(0, count, _BLOCK):
                block = source.standard_normal(min(_BLOCK, count - start), dtype=numpy.float32)
                file.write((block * scale).astype(numpy.float16).tobytes())
    making.rename(path)


def write_stable_diffusion(folder: Path, *, small: bool = False) -> None:
    """Write the repository of Stable Diffusion 1.4: settings, float16 weights, a safety checker."""
    import torch
    from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPTextConfig, CLIPTextModel

    from tests.conftest import write_tokenizer

    write_tokenizer(folder / "tokenizer")
    settings = folder / "tokenizer" / "tokenizer_config.json"
    longer = {**json.loads(settings.read_text()), "model_max_length": 77}
    settings.write_text(json.dumps(longer))
    widths = (32, 32, 64, 64) if small else (320, 640, 1280, 1280)
    text = {"hidden_size": 32, "intermediate_size": 64} if small else {"hidden_size": 768}
    eye = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2} if small else {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
        "num_attention_heads": 16, "patch_size": 14,
    }  # fmt: skip
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64, cross_attention_dim=text["hidden_size"], attention_head_dim=8,
            in_channels=4, out_channels=4, block_out_channels=widths, layers_per_block=2,
        )  # fmt: skip
        vae = AutoencoderKL(
            block_out_channels=(32,) * 4 if small else (128, 256, 512, 512), layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4, sample_size=512, latent_channels=4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )  # fmt: skip
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                **{"intermediate_size": 3072, **text}, vocab_size=49408, num_hidden_layers=12,
                num_attention_heads=2 if small else 12, projection_dim=text["hidden_size"],
                bos_token_id=49406, eos_token_id=49407,
            )
        )  # fmt: skip
        checker = StableDiffusionSafetyChecker(CLIPConfig(projection_dim=32 if small else 768, vision_config=eye))
    parts = {
        "unet": (unet, "diffusion_pytorch_model"),
        "vae": (vae, "diffusion_pytorch_model"),
        "text_encoder": (text_encoder, "model"),
        "safety_checker": (checker, "model"),
    }
    # The names in the public files, which transformers before version 5 wrote.
    published = {
        "text_encoder": lambda key: f"text_model.{key}",
        "safety_checker": lambda key: key.replace("vision_model.", "vision_model.vision_model."),
    }
    for name, (module, stem) in parts.items():
        names = published.get(name, str)
        state = {names(key): value for key, value in module.state_dict().items()}
        write_noise(state, folder / name / f"{stem}.fp16.safetensors")
        if hasattr(module, "save_config"):
            module.save_config(folder / name)
        else:
            module.config.save_pretrained(folder / name)
    PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True,
        set_alpha_to_one=False, steps_offset=1,
    ).save_pretrained(folder / "scheduler")  # fmt: skip
    (folder / "feature_extractor").mkdir()
    (folder / "feature_extractor" / "preprocessor_config.json").write_text(json.dumps({"size": 224, "crop_size": 224}))
    index = {
        "_class_name": "StableDiffusionPipeline",
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))


def write_tower(folder: Path, config: dict[str, Any]) -> None:
    """Write the published file of an image tower, which holds another tower too."""
    import torch
    from open_clip.transformer import VisionTransformer

    options = dict(config["model_cfg"]["vision_cfg"])
    heads = options["width"] // options.pop("head_width")
    with torch.device("meta"):
        both = torch.nn.ModuleDict(
            {
                "visual": VisionTransformer(
                    heads=heads,
                    mlp_ratio=4.0,
                    output_dim=config["model_cfg"]["embed_dim"],
                    **options,
                ),
                "transformer": torch.nn.Linear(4, 4),
            }
        )
    write_noise(both.state_dict(), folder / "open_clip_model.safetensors")


def write_parser(folder: Path, *, small: bool = False) -> None:
    """Write a repository as the public face parser's: a SegFormer B5 of 19 labels."""
    import torch
    from transformers import SegformerConfig, SegformerForSemanticSegmentation
    from transformers.core_model_loading import revert_weight_conversion

    sizes = {"hidden_sizes": [64, 128, 320, 512], "depths": [3, 6, 40, 3]}
    decoder = 768
    if small:
        sizes, decoder = {"hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4}, 16
    config = SegformerConfig(**sizes, decoder_hidden_size=decoder, id2label=dict(enumerate(PARTS)))
    with torch.device("meta"):
        parser = SegformerForSemanticSegmentation(config)
    published = revert_weight_conversion(parser, parser.state_dict())  # names of before version 5, as above
    write_noise(published, folder / "model.safetensors")
    config.save_pretrained(folder)
    plan = {
        "size": {"height": 512, "width": 512},
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(plan))


def publish(hub: FakeHub, folder: Path, *, small: bool = False) -> None:
    """Publish `sd14` and its image tower at their pinned commits, a face parser and a stand-in for the detector.

    The tower's checksum is replaced: it is another file.
    """
    from e4t_cli.hub import image_tower as towers
    from e4t_cli.hub.bases import PUBLISHED

    base, pinned = PUBLISHED["sd14"], towers.VIT_H_14
    config = pinned.config
    if small:
        vision = {
            "image_size": 32, "layers": 4, "width": 32, "head_width": 16, "patch_size": 8,
        }  # fmt: skip
        config = {
            "model_cfg": {"embed_dim": 16, "vision_cfg": vision},
            "preprocess_cfg": {**config["preprocess_cfg"], "size": 32},
        }
    if not (folder / "sd14" / "model_index.json").is_file():
        write_stable_diffusion(folder / "sd14", small=small)
    if not (folder / "tower" / pinned.file).is_file():
        write_tower(folder / "tower", config)
    if not (folder / "parser" / "config.json").is_file():
        write_parser(folder / "parser", small=small)
    hub.add(PARSER, folder / "parser", licence="")
    # No detector can be made here: the file is fetched, refused for its checksum, and the parser searches the face.
    (folder / "detector").mkdir(exist_ok=True)
    (folder / "detector" / "face_detection_yunet_2023mar.onnx").write_bytes(b"a stand-in for an ONNX file")
    hub.add(DETECTOR, folder / "detector", licence="mit")
    hub.add(base.repository, folder / "sd14", commit=base.revision, licence=base.licence)
    hub.add(pinned.repository, folder / "tower", commit=pinned.revision, licence="mit")
    file = hub.repositories[pinned.repository][pinned.revision].files[pinned.file]
    tower = replace(pinned, sha256=file.sha256, size=file.size, config=config)
    for function in (
        towers.fetch_image_tower, towers.has_tower, towers.tower_folder, towers.missing_bytes
    ):  # fmt: skip
        function.__defaults__ = (tower,)


def main(arguments: list[str]) -> int:
    """Publish, then run one command of e4t in this process."""
    split = arguments.index("--")
    folder, *more = arguments[:split]
    root = Path(folder)
    with FakeHub() as hub:
        os.environ.update(hub.environment(root / "caches"))
        publish(hub, root / "published")
        if "--faces" in more:
            checkpoint = root / "published" / "faces"
            if not (checkpoint / "config.json").is_file():
                from tests.e4t_diffusion.full_size import write_full_size

                write_full_size(checkpoint)
            hub.add(FACES, checkpoint, licence="")
        from e4t_cli.cli.app import run

        return run(arguments[split + 1 :])


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
