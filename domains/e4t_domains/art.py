"""The domain of art: the concept is a style, so the training prompts describe how, not what."""

from e4t_cli import Domain, PretrainingConfig, TuningConfig

art = Domain(
    name="art",
    descriptor="art",  # section 3.1
    summary="one style, from one image",
    tuning=TuningConfig(
        steps=5,  # section 3.5
        base_learning_rate=3e-6,  # section 3.5
        reg_weight=1e-4,  # section 3.5
    ),
    pretraining=PretrainingConfig(
        steps=100_000,  # section 3.5
        base_learning_rate=1e-6,  # section 3.5
        reg_weight=0.01,  # section 3.3
    ),
    weights={"mini": "package:e4t_domains/packs/art/mini"},
    # Paper silent: the prompts. Those for things ("a photo of {}") do not fit a style.
    prompt_templates=(
        "{}",
        "a picture in the style of {}",
        "a painting in the style of {}",
        "a drawing in the style of {}",
        "a work in the style of {}",
        "a small picture in the style of {}",
        "a large picture in the style of {}",
        "a close-up in the style of {}",
        "a detail in the style of {}",
        "a bright picture in the style of {}",
        "a dark picture in the style of {}",
        "a good picture in the style of {}",
        "a cropped picture in the style of {}",
        "something in the style of {}",
        "made in the style of {}",
        "this is {}",
        "an example of {}",
        "a piece of {}",
        "an image in the manner of {}",
        "a picture done as {}",
    ),
    licence="Apache-2.0",  # of the weights for `mini`: drawn by this project
)
