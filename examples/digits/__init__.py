"""The quick example: a DiT of 3.6 M parameters that draws scikit-learn's handwritten digits, 8 x 8 pixels."""

from pathlib import Path

from common.registry import Example, Preset

MODEL = "DiT-digits/2"
FOLDER = Path(__file__).parent

EXAMPLE = Example(
    presets={
        MODEL: Preset(
            {
                "input_size": 8, "patch_size": 2, "in_channels": 1, "hidden_size": 128, "depth": 12,
                "num_heads": 4, "num_classes": 10,
            },
            FOLDER / "dit.safetensors",
            in_pixels=True,
        )
    },
    data={"digits": "examples.digits.data:digit_images"},
    features={"digits": "examples.digits.classifier:DigitsFeatures"},
    routers=FOLDER / "routers",
    judges={MODEL: "examples.digits.classifier:Judge"},
)  # fmt: skip
