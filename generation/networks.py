"""Pictures from captions: the generator, the discriminator and their losses.

After GAN-CLS (Reed et al. 2016): both networks are conditioned on the caption's embedding, and the discriminator also sees
real pictures with mismatched captions, so that it cannot ignore captions. As in XMC-GAN (Zhang et al. 2021), the mismatched
captions are all others of the batch, and both networks minimise a matching loss, a cross-entropy over the batch's captions.
"""

import torch
import torch.nn.functional as F
from torch import nn

IMAGE_SIZE = 64  # height and width of generated pictures, in pixels
NOISE_DIM = 64  # random numbers per picture
CHANNELS = (256, 128, 64, 32)  # of the feature maps of 4, 8, 16 and 32 pixels
CAPTION_DIM = 128  # features that a caption's embedding is projected to
R1_SUBSET = 8  # one picture in so many is used for the gradient penalty, as for all it would double the step's time


class CaptionFeatures(nn.Sequential):
    """L2-normalised embeddings, (n, width), to (n, CAPTION_DIM) features."""

    def __init__(self, width):
        super().__init__(nn.Linear(width, 2 * CAPTION_DIM), nn.LeakyReLU(0.2), nn.Linear(2 * CAPTION_DIM, CAPTION_DIM))

    def forward(self, embedding):
        # Scaled to a mean square of 1, like the noise; a unit vector's entries are much smaller.
        return super().forward(embedding * embedding.shape[1] ** 0.5)


class ConditionalNorm(nn.Module):
    """BatchNorm whose scale and shift are predicted from the condition (Dumoulin et al. 2017; de Vries et al. 2017)."""

    def __init__(self, channels, condition_width):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.scale_and_shift = nn.Linear(condition_width, 2 * channels)

    def forward(self, x, condition):
        """x: (n, c, h, w), condition: (n, d) -> (n, c, h, w)."""
        scale, shift = self.scale_and_shift(condition)[..., None, None].chunk(2, dim=1)
        return self.norm(x) * (1 + scale) + shift


class Generator(nn.Module):
    """Noise and caption embeddings to pictures. width: d_e."""

    def __init__(self, width):
        super().__init__()
        self.caption = CaptionFeatures(width)
        self.begin = nn.Linear(NOISE_DIM + CAPTION_DIM, CHANNELS[0] * 4 * 4)
        self.norms = nn.ModuleList(ConditionalNorm(channels, NOISE_DIM + CAPTION_DIM) for channels in CHANNELS)
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1) for before, after in zip(CHANNELS, [*CHANNELS[1:], 3 * 2 * 2])
        )

    def forward(self, noise, embedding):
        """noise: (n, NOISE_DIM), L2-normalised embedding: (n, d_e) -> (n, 3, IMAGE_SIZE, IMAGE_SIZE) pixels of 0 to 255."""
        condition = torch.cat([noise, self.caption(embedding)], dim=1)
        x = self.begin(condition).view(-1, CHANNELS[0], 4, 4).contiguous(memory_format=torch.channels_last)
        for norm, conv in zip(self.norms[:-1], self.convs[:-1]):
            x = conv(F.interpolate(F.relu(norm(x, condition)), scale_factor=2))  # (n, c, h, w) -> (n, c / 2, 2 h, 2 w)
        x = F.pixel_shuffle(self.convs[-1](F.relu(self.norms[-1](x, condition))), 2)
        return 127.5 * (1 + x.float().tanh())


class Discriminator(nn.Module):
    """Pictures and captions to a matrix of scores: how real each picture looks, plus how well it matches each caption.

    After the projection discriminator (Miyato and Koyama 2018). width: d_e.
    """

    def __init__(self, width):
        super().__init__()
        channels = [3, *CHANNELS[::-1]]
        self.reduce = nn.ModuleList(
            nn.Conv2d(before, after, 4, stride=2, padding=1) for before, after in zip(channels, channels[1:])
        )
        self.real = nn.Linear(CHANNELS[0] * 4 * 4, 1)
        self.picture = nn.Linear(CHANNELS[0] * 4 * 4, CAPTION_DIM)
        self.caption = CaptionFeatures(width)

    def forward(self, image, embedding):
        """image: (n, 3, IMAGE_SIZE, IMAGE_SIZE) pixels of 0 to 255, L2-normalised embedding: (m, d_e) -> (n, m) scores."""
        x = (image / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        for reduce in self.reduce:
            x = F.leaky_relu(reduce(x), 0.2)
        x = x.flatten(1)
        return (self.real(x) + self.picture(x) @ self.caption(embedding).T).float()


def matching_loss(scores):
    """The cross-entropy of classifying each picture's caption among those of the batch: one half of CLIP's loss.

    scores: (n, n), a row per picture, a column per caption.
    """
    return F.cross_entropy(scores, torch.arange(len(scores), device=scores.device))


def discriminator_loss(discriminator, real, fake, embedding):
    """The hinge loss (Lim and Ye 2017) over real pairs, mismatched pairs and generated pairs, plus the matching loss.

    real, fake: (n, 3, IMAGE_SIZE, IMAGE_SIZE) pixels of n different captions; embedding: (n, d_e) of those captions.
    """
    scores, fake_scores = discriminator(real, embedding), discriminator(fake, embedding).diagonal()
    mismatched = scores[~torch.eye(len(scores), dtype=torch.bool, device=scores.device)]
    hinge = F.relu(1 - scores.diagonal()).mean() + (F.relu(1 + mismatched).mean() + F.relu(1 + fake_scores).mean()) / 2
    return hinge + matching_loss(scores)


def gradient_penalty(discriminator, real, embedding):
    """R1 (Mescheder et al. 2018): half the mean squared gradient norm of real pairs' scores, for pixels of -1 to 1.

    It keeps the discriminator's gradients small, and so the training stable. Shapes as in `discriminator_loss`, but only one
    picture in R1_SUBSET is used. To be called without autocast: gradients in bf16 are too imprecise.
    """
    n = -(-len(real) // R1_SUBSET)
    image = real[:n].clone().requires_grad_()
    score = discriminator(image, embedding[:n]).diagonal().sum()
    (gradient,) = torch.autograd.grad(score, image, create_graph=True)
    return (127.5 * gradient).square().sum(dim=(1, 2, 3)).mean() / 2


def generator_loss(discriminator, fake, embedding):
    """Minus the mean score of generated pairs, plus the matching loss. Shapes as in `discriminator_loss`."""
    scores = discriminator(fake, embedding)
    return matching_loss(scores) - scores.diagonal().mean()


@torch.no_grad()
def draw_pictures(generator, noise, embeddings):
    """noise: (n, NOISE_DIM), L2-normalised embeddings: (n, d_e) -> (n, IMAGE_SIZE, IMAGE_SIZE, 3) uint8 RGB array."""
    generator.eval()
    return generator(noise, embeddings).round().byte().permute(0, 2, 3, 1).cpu().numpy()
