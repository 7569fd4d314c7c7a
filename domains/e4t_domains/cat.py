"""The domain of cats: no mask in tuning, and five steps."""

from e4t_cli import SUBJECT_TEMPLATES, Domain, PretrainingConfig, TuningConfig

cat = Domain(
    name="cat",
    descriptor="cat",  # section 3.1
    summary="one cat, from one photo",
    tuning=TuningConfig(
        steps=5,  # section 3.5
        base_learning_rate=3e-6,  # section 3.5
        reg_weight=1e-4,  # section 3.5
    ),
    pretraining=PretrainingConfig(
        steps=60_000,  # section 3.5
        base_learning_rate=1e-6,  # section 3.5
        reg_weight=0.01,  # section 3.3
    ),
    weights={"mini": "package:e4t_domains/packs/cat/mini"},
    prompt_templates=(
        *SUBJECT_TEMPLATES,
        "a photo of {} looking up",
        "a photo of {} at rest",
        "the head of {}",
        "a pet photo of {}",
    ),
    mask_words="a cat",  # for `--mask words`; the paper masks faces only
    licence="Apache-2.0",  # of the weights for `mini`: drawn by this project
)
