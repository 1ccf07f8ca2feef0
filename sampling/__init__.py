"""From noise to pictures: seeds, the denoising loop, decoding, the parts of a large sampling."""

from backbones.loading import build_model as build_model
from backbones.loading import load_model as load_model
from sampling.decoding import decode as decode
from sampling.loop import Trajectory as Trajectory
from sampling.loop import denoise_loop as denoise_loop
from sampling.loop import generate as generate
from sampling.loop import generate_seeded as generate_seeded
from sampling.loop import sample as sample
from sampling.seeds import draw_labels as draw_labels
from sampling.seeds import draw_noise as draw_noise
from sampling.seeds import sample_generator as sample_generator
