"""CLIP and a generator trained at once: python main.py --gan joint.

    total loss = CLIP loss over real and generated pairs + lambda * generator loss

Of each batch the last k captions (--extra-fraction) lend their real pictures to the discriminator, and CLIP sees generated
ones in their place: a generated picture never meets the real picture of its caption. What each term moves, and why:

    CLIP loss                the towers, heads and temperature, as ever; and the generator, through the generated pictures,
                             as it should draw what CLIP can tell from other captions' pictures
    lambda * generator loss  the generator alone. The captions' embeddings are detached: the text tower would else make
                             captions easy to draw instead of easy to find
    discriminator loss       the discriminator alone, in a step of its own before: its aim is opposed to the generator's,
                             and in a sum the two would cancel

Both terms are means over pairs, in nats and in scores of which the hinge loss asks no more than 1: lambda is of the order of 1.
"""

import torch
import torch.nn.functional as F

from device import autocast
from generator import (
    NOISE,
    SIDE,
    Discriminator,
    Generator,
    discriminator_loss,
    draw_pictures,
    generator_loss,
    gradient_penalty,
)  # fmt: skip

RATE, BETAS = 1e-3, (0.0, 0.9)  # Adam's, of both networks


class Joint:
    """A generator and its discriminator beside a CLIPModel.

    width: d_e. count: k, the generated pictures of a batch, at least 2. weight: lambda.
    Attributes: parameter_group, the generator's, for the optimizer that also moves the model.
    """

    def __init__(self, width, count, weight, device, dtype):
        self.count, self.weight, self.device, self.dtype = count, weight, device, dtype
        self.generator = Generator(width).to(device, memory_format=torch.channels_last)
        self.discriminator = Discriminator(width).to(device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.Adam(self.discriminator.parameters(), lr=RATE, betas=BETAS)
        parameters = list(self.generator.parameters())
        self.parameter_group = {"params": parameters, "peak": RATE, "lr": RATE, "betas": BETAS, "weight_decay": 0.0}

    def parts(self):
        return {"generator": self.generator, "discriminator": self.discriminator, "discriminator_optimizer": self.optimizer}

    def state_dict(self):
        return {name: part.state_dict() for name, part in self.parts().items()}

    def load_state_dict(self, state):
        for name, part in self.parts().items():
            part.load_state_dict(state[name])

    def replace(self, model, image, text, attention_mask, scaler):
        """Puts generated pictures in the places of a batch's last k, and takes a step of the discriminator.

        image: (n, 3, h, w) pixels of 0 to 255; text and attention_mask: (n, l).
        Returns (image, lambda * generator loss): (n, 3, h, w) and ().
        """
        self.generator.train()  # drawing pictures leaves it in eval mode
        own, mask = text[-self.count :], None if attention_mask is None else attention_mask[-self.count :]
        real = F.interpolate(image[-self.count :].float(), size=SIDE, mode="area")
        with autocast(self.device, self.dtype):
            with torch.no_grad():
                embedding = F.normalize(model.encode_text(own, mask).float(), dim=1)  # (k, d_e)
            fake = self.generator(torch.randn(self.count, NOISE).to(self.device), embedding)
            loss = discriminator_loss(self.discriminator, real, fake.detach(), embedding)
        loss = loss + gradient_penalty(self.discriminator, real, embedding)
        self.optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(self.optimizer)
        self.discriminator.requires_grad_(False)
        with autocast(self.device, self.dtype):
            adversarial = self.weight * generator_loss(self.discriminator, fake, embedding)
        self.discriminator.requires_grad_(True)
        enlarged = F.interpolate(fake, size=image.shape[-2:], mode="bilinear", antialias=True)
        return torch.cat([image[: -self.count].float(), enlarged]), adversarial

    @torch.no_grad()
    def pictures(self, embeddings):
        """(n, d_e) embeddings of length 1 -> n pictures, a (n, SIDE, SIDE, 3) uint8 array, the same in each call."""
        noise = torch.randn(len(embeddings), NOISE, generator=torch.Generator().manual_seed(0)).to(self.device)
        return draw_pictures(self.generator, noise, embeddings.to(self.device))
