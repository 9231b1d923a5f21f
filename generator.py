"""Pictures from captions: a generator, the discriminator that it learns from, and their losses.

After GAN-CLS (Reed et al. 2016): both networks see the caption's embedding, and the discriminator also sees real pictures
with captions of others, so that it has to read them.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

SIDE = 64  # height and width of generated pictures, in pixels
NOISE = 64  # random numbers a picture
CHANNELS = (256, 128, 64, 32)  # of the generator's feature maps, of 4, 8, 16 and 32 pixels; the discriminator's in reverse
CAPTION = 128  # features that a caption's embedding is reduced to


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
        self.caption = nn.Linear(width, CAPTION)
        self.begin = nn.Linear(NOISE + CAPTION, CHANNELS[0] * 4 * 4)
        self.norms = nn.ModuleList(ConditionalNorm(channels, NOISE + CAPTION) for channels in CHANNELS)
        self.enlarge = nn.ModuleList(
            nn.ConvTranspose2d(before, after, 4, stride=2, padding=1) for before, after in zip(CHANNELS, [*CHANNELS[1:], 3])
        )

    def forward(self, noise, embedding):
        """noise: (n, NOISE), embedding: (n, d_e) of length 1 -> (n, 3, SIDE, SIDE) pixels of 0 to 255."""
        # A unit vector's entries are small beside the noise's, which have variance 1; so they are brought to that too.
        condition = torch.cat([noise, self.caption(embedding * embedding.shape[1] ** 0.5)], dim=1)
        x = self.begin(condition).view(-1, CHANNELS[0], 4, 4).contiguous(memory_format=torch.channels_last)
        for norm, enlarge in zip(self.norms, self.enlarge):
            x = enlarge(F.relu(norm(x, condition)))  # (n, c, h, w) -> (n, c / 2, 2 h, 2 w)
        return 127.5 * (1 + x.float().tanh())


class Discriminator(nn.Module):
    """Pictures and captions to a number: how much a picture looks real and of that caption. width: d_e.

    Spectral normalisation (Miyato et al. 2018) bounds how steep it is, which keeps the training stable.
    """

    def __init__(self, width):
        super().__init__()
        channels = [3, *CHANNELS[::-1]]
        self.reduce = nn.ModuleList(
            spectral_norm(nn.Conv2d(before, after, 4, stride=2, padding=1)) for before, after in zip(channels, channels[1:])
        )
        self.caption = spectral_norm(nn.Linear(width, CAPTION))
        self.join = spectral_norm(nn.Conv2d(CHANNELS[0] + CAPTION, CHANNELS[0], 1))
        self.judge = spectral_norm(nn.Conv2d(CHANNELS[0], 1, 4))

    def look(self, image):
        """(n, 3, SIDE, SIDE) pixels of 0 to 255 -> (n, c, 4, 4) features."""
        x = (image / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        for reduce in self.reduce:
            x = F.leaky_relu(reduce(x), 0.2)
        return x

    def forward(self, features, embedding):
        """features: (n, c, 4, 4) of `look`, embedding: (n, d_e) of length 1 -> (n,) scores."""
        caption = self.caption(embedding * embedding.shape[1] ** 0.5)  # (n, CAPTION)
        caption = caption[..., None, None].expand(-1, -1, 4, 4)  # at each place, as captions say what is where
        x = F.leaky_relu(self.join(torch.cat([features, caption], dim=1)), 0.2)
        return self.judge(x).flatten()


def discriminator_loss(discriminator, real, fake, embedding):
    """The hinge loss (Lim and Ye 2017) over real pairs, real pictures with wrong captions, and generated pairs.

    real, fake: (n, 3, SIDE, SIDE) pixels of n different captions; embedding: (n, d_e) of those captions.
    """
    looked = discriminator.look(real)
    right, wrong = discriminator(looked, embedding), discriminator(looked, embedding.roll(1, dims=0))
    made = discriminator(discriminator.look(fake), embedding)
    return F.relu(1 - right.float()).mean() + (F.relu(1 + wrong.float()).mean() + F.relu(1 + made.float()).mean()) / 2


def generator_loss(discriminator, fake, embedding):
    """Minus the mean score of n generated pictures, (n, 3, SIDE, SIDE), with the captions that they were made from."""
    return -discriminator(discriminator.look(fake), embedding).float().mean()


@torch.no_grad()
def draw_pictures(generator, noise, embeddings):
    """noise: (n, NOISE), embeddings: (n, d_e) of length 1 -> n pictures, a (n, SIDE, SIDE, 3) uint8 RGB array."""
    generator.eval()
    return generator(noise, embeddings).round().byte().permute(0, 2, 3, 1).cpu().numpy()
