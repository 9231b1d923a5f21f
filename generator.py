"""Pictures from captions: a generator, the discriminator that it learns from, and their losses.

After GAN-CLS (Reed et al. 2016): both networks see the caption's embedding, and the discriminator also sees real pictures
with captions of others, so that it has to read them. As in XMC-GAN (Zhang et al. 2021) those are all the others of the batch,
and the generator too is asked for pictures that go with their own caption rather than with others'.
"""

import torch
import torch.nn.functional as F
from torch import nn

SIDE = 64  # height and width of generated pictures, in pixels
NOISE = 64  # random numbers a picture
CHANNELS = (256, 128, 64, 32)  # of feature maps of 4, 8, 16 and 32 pixels
CAPTION = 128  # features that a caption's embedding is reduced to
PENALISED = 8  # of so many pictures one takes part in the gradient penalty, which costs as much as a step


class CaptionFeatures(nn.Sequential):
    """(n, width) embeddings of length 1 to (n, CAPTION) features."""

    def __init__(self, width):
        super().__init__(nn.Linear(width, 2 * CAPTION), nn.LeakyReLU(0.2), nn.Linear(2 * CAPTION, CAPTION))

    def forward(self, embedding):
        # A unit vector's entries are small beside the noise's, which have variance 1; so they are brought to that too.
        return super().forward(embedding * embedding.shape[1] ** 0.5)


class ConditionalNorm(nn.Module):
    """BatchNorm whose scale and shift come from the condition (Dumoulin et al. 2017; de Vries et al. 2017)."""

    def __init__(self, channels, condition_width):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.scale_and_shift = nn.Linear(condition_width, 2 * channels)

    def forward(self, x, condition):
        """x: (n, c, h, w), condition: (n, d) -> (n, c, h, w)."""
        scale, shift = self.scale_and_shift(condition)[..., None, None].chunk(2, dim=1)
        return self.norm(x) * (1 + scale) + shift


class Generator(nn.Module):
    """Noise and captions to pictures. width: d_e, of the captions' embeddings."""

    def __init__(self, width):
        super().__init__()
        self.caption = CaptionFeatures(width)
        self.begin = nn.Linear(NOISE + CAPTION, CHANNELS[0] * 4 * 4)
        self.norms = nn.ModuleList(ConditionalNorm(channels, NOISE + CAPTION) for channels in CHANNELS)
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1) for before, after in zip(CHANNELS, [*CHANNELS[1:], 3 * 2 * 2])
        )

    def forward(self, noise, embedding):
        """noise: (n, NOISE), embedding: (n, d_e) of length 1 -> (n, 3, SIDE, SIDE) pixels of 0 to 255."""
        condition = torch.cat([noise, self.caption(embedding)], dim=1)
        x = self.begin(condition).view(-1, CHANNELS[0], 4, 4).contiguous(memory_format=torch.channels_last)
        for norm, conv in zip(self.norms[:-1], self.convs[:-1]):
            x = conv(F.interpolate(F.relu(norm(x, condition)), scale_factor=2))  # (n, c, h, w) -> (n, c / 2, 2 h, 2 w)
        x = F.pixel_shuffle(self.convs[-1](F.relu(self.norms[-1](x, condition))), 2)
        return 127.5 * (1 + x.float().tanh())


class Discriminator(nn.Module):
    """Pictures and captions to a matrix of scores: how real each picture looks, plus how well it goes with each caption.

    After the projection discriminator (Miyato and Koyama 2018). width: d_e.
    """

    def __init__(self, width):
        super().__init__()
        channels = [3, *CHANNELS[::-1]]
        self.reduce = nn.ModuleList(
            nn.Conv2d(before, after, 4, stride=2, padding=1) for before, after in zip(channels, channels[1:])
        )
        self.real = nn.Linear(CHANNELS[0] * 4 * 4, 1)
        self.picture = nn.Linear(CHANNELS[0] * 4 * 4, CAPTION)
        self.caption = CaptionFeatures(width)

    def forward(self, image, embedding):
        """image: (n, 3, SIDE, SIDE) pixels of 0 to 255, embedding: (m, d_e) of length 1 -> (n, m) scores."""
        x = (image / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        for reduce in self.reduce:
            x = F.leaky_relu(reduce(x), 0.2)
        x = x.flatten(1)
        return (self.real(x) + self.picture(x) @ self.caption(embedding).T).float()


def matching_loss(scores):
    """The cross-entropy of finding each picture's caption among those of the batch, (n, n) scores: half of CLIP's loss."""
    return F.cross_entropy(scores, torch.arange(len(scores), device=scores.device))


def discriminator_loss(discriminator, real, fake, embedding):
    """The hinge loss (Lim and Ye 2017) over real pairs, real pictures with wrong captions and generated pairs, plus matching.

    real, fake: (n, 3, SIDE, SIDE) pixels of n different captions; embedding: (n, d_e) of those captions.
    """
    scores, made = discriminator(real, embedding), discriminator(fake, embedding).diagonal()
    wrong = scores[~torch.eye(len(scores), dtype=torch.bool, device=scores.device)]
    hinge = F.relu(1 - scores.diagonal()).mean() + (F.relu(1 + wrong).mean() + F.relu(1 + made).mean()) / 2
    return hinge + matching_loss(scores)


def gradient_penalty(discriminator, real, embedding):
    """Half the mean squared slope of real pairs' scores in the pixels (R1; Mescheder et al. 2018), for pixels of -1 to 1.

    It keeps the discriminator from growing steep where it cannot be fooled any more, and so the training stable. Shapes as in
    `discriminator_loss`, of which one picture in PENALISED takes part. Without autocast: bf16 slopes are too coarse.
    """
    n = -(-len(real) // PENALISED)
    image = real[:n].clone().requires_grad_()
    score = discriminator(image, embedding[:n]).diagonal().sum()
    (slope,) = torch.autograd.grad(score, image, create_graph=True)
    return (127.5 * slope).square().sum(dim=(1, 2, 3)).mean() / 2


def generator_loss(discriminator, fake, embedding):
    """Minus the mean score of n generated pictures, (n, 3, SIDE, SIDE), with their captions, (n, d_e), plus matching."""
    scores = discriminator(fake, embedding)
    return matching_loss(scores) - scores.diagonal().mean()


@torch.no_grad()
def draw_pictures(generator, noise, embeddings):
    """noise: (n, NOISE), embeddings: (n, d_e) of length 1 -> n pictures, a (n, SIDE, SIDE, 3) uint8 RGB array."""
    generator.eval()
    return generator(noise, embeddings).round().byte().permute(0, 2, 3, 1).cpu().numpy()
