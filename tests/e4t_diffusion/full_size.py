"""A checkpoint of the layout, names and sizes of the public face weights, with random values."""

import torch

from e4t_cli.formats.e4t_diffusion.checkpoint import tower_sizes
from e4t_cli.formats.e4t_diffusion.conversion import expected_shapes
from e4t_cli.nn.patch_encoder import PatchEncoderConfig
from e4t_cli.nn.weight_offsets import projection_shapes
from tests.e4t_diffusion import checkpoints

TOWER = "ViT-H-14::laion2b_s32b_b79k"


def random_values(*shape):
    return torch.empty(shape).uniform_(-1, 1) * max(shape[-1:], default=1) ** -0.5


def network(rows, columns):
    """The tensors of one offset at the size and scale of torch's own first weights."""
    tensors = {"v": torch.ones(1)}
    for name, reads, writes in (
        ("linear1", 1, columns), ("linear2", 1, rows),
        ("linear_column", columns, columns), ("linear_row", rows, rows),
    ):  # fmt: skip
        tensors[f"{name}.weight"] = random_values(writes, reads)
        tensors[f"{name}.bias"] = torch.empty(writes).uniform_(-1, 1) * reads**-0.5
    return tensors


def write_full_size(folder):
    """Write the three files, 4 GB; returns the folder."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64, cross_attention_dim=768, attention_head_dim=8, in_channels=4,
            out_channels=4, block_out_channels=(320, 640, 1280, 1280), layers_per_block=2,
        )  # fmt: skip
    offsets = {
        f"{path.replace('.to_', '.wo_')}.{key}": value
        for path, shape in projection_shapes(unet).items()
        for key, value in network(*shape).items()
    }
    sizes = {"unet_width": 10_880, "hidden_width": 1280, "embedding_width": 768}
    config = PatchEncoderConfig(**tower_sizes(TOWER), **sizes)
    encoder = {key: random_values(*shape) for key, shape in expected_shapes(config).items()}
    settings = checkpoints.config(clip_model_name_or_path=TOWER)
    return checkpoints.write_checkpoint(folder, encoder, offsets, settings)
