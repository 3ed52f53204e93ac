"""The shapes of the parameters of well-known models, in the order of their definitions.

From torchvision (ResNet-50, ViT-B/16) and from the published configurations of GPT-2 and Llama 3.
"""

from __future__ import annotations

Shape = tuple[int, ...]
Shapes = tuple[Shape, ...]


def batch_norm(channels: int) -> Shapes:
    """Weight and bias."""
    return ((channels,), (channels,))


def bottleneck(inputs: int, width: int, outputs: int, downsample: bool) -> Shapes:
    """A residual block of three convolutions, with one more where the shape changes."""
    block = (
        *((width, inputs, 1, 1), *batch_norm(width)),
        *((width, width, 3, 3), *batch_norm(width)),
        *((outputs, width, 1, 1), *batch_norm(outputs)),
    )
    return (*block, (outputs, inputs, 1, 1), *batch_norm(outputs)) if downsample else block


def resnet(blocks: tuple[int, ...]) -> Shapes:
    """A ResNet of bottleneck blocks, so many in each stage, for ImageNet."""
    shapes: Shapes = ((64, 3, 7, 7), *batch_norm(64))
    inputs = 64
    for stage, count in enumerate(blocks):
        width = 64 * 2**stage
        for block in range(count):
            shapes += bottleneck(inputs, width, 4 * width, downsample=block == 0)
            inputs = 4 * width
    return (*shapes, (1000, inputs), (1000,))


def linear(outputs: int, inputs: int) -> Shapes:
    """Weight and bias."""
    return ((outputs, inputs), (outputs,))


def layer_norm(width: int) -> Shapes:
    """Weight and bias."""
    return ((width,), (width,))


def transformer_block(width: int) -> Shapes:
    """Attention and a perceptron four times as wide, all with biases: that of ViT and GPT-2."""
    return (
        *layer_norm(width),
        *(*linear(3 * width, width), *linear(width, width)),
        *layer_norm(width),
        *(*linear(4 * width, width), *linear(width, 4 * width)),
    )


def gpt_2(width: int, layers: int) -> Shapes:
    """GPT-2, whose head is tied to the embedding of tokens."""
    return ((50257, width), (1024, width), *layers * transformer_block(width), *layer_norm(width))


RESNET_50 = resnet((3, 4, 6, 3))
VIT_B_16: Shapes = (
    (1, 1, 768),  # the class token
    *((768, 3, 16, 16), (768,)),  # patches
    (1, 197, 768),  # positions
    *12 * transformer_block(768),
    *layer_norm(768),
    *linear(1000, 768),
)
GPT_2_SMALL = gpt_2(768, 12)
GPT_2_MEDIUM = gpt_2(1024, 24)

LLAMA_3_8B_LAYERS = 32
LLAMA_3_8B_LAYER: Shapes = (
    *((4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096)),  # queries, keys, values, output
    *((14336, 4096), (14336, 4096), (4096, 14336)),  # gate, up, down
    *((4096,), (4096,)),  # norms
)
LLAMA_3_8B_ENDS: Shapes = ((128256, 4096), (4096,), (128256, 4096))  # embedding, norm, head
