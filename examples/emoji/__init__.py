"""Text to image in miniature: emoji in three styles with their names, and a latent PixArt."""

from common.registry import Example

EXAMPLE = Example()
