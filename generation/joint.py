"""CLIP and a generator trained together: python main.py --gan joint.

    total loss = CLIP loss over real and generated pairs + lambda * generator loss

For the last k captions of each batch (--extra-fraction), the real pictures go to the discriminator only, and CLIP gets
generated pictures instead: no batch of CLIP has both the real and a generated picture of a caption. Which parameters each
loss updates, and why:

    CLIP loss                the encoders, heads and temperature; and, through the generated pictures, the generator, which
                             learns to draw pictures that CLIP matches with their captions
    lambda * generator loss  the generator only. The captions' embeddings are detached, or the text encoder would learn
                             embeddings that are easy to draw instead of easy to retrieve
    discriminator loss       the discriminator only, in a separate step before: its objective is opposed to the generator's,
                             and in a sum the two would cancel

Both terms of the total loss are means over pairs of similar size, so lambda is of the order of 1.
"""

import torch
import torch.nn.functional as F

from generation.networks import (
    IMAGE_SIZE,
    NOISE_DIM,
    Discriminator,
    Generator,
    discriminator_loss,
    draw_pictures,
    generator_loss,
    gradient_penalty,
)
from utils.device import autocast

LR, BETAS = 1e-3, (0.0, 0.9)  # of Adam, for both networks


class Joint:
    """A generator and its discriminator, trained together with a CLIPModel.

    width: d_e. count: k, the generated pictures per batch, at least 2. weight: lambda.
    Attributes: parameter_group, of the generator, for the optimizer of the CLIPModel.
    """

    def __init__(self, width, count, weight, device, dtype):
        self.count, self.weight, self.device, self.dtype = count, weight, device, dtype
        self.generator = Generator(width).to(device, memory_format=torch.channels_last)
        self.discriminator = Discriminator(width).to(device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.Adam(self.discriminator.parameters(), lr=LR, betas=BETAS)
        parameters = list(self.generator.parameters())
        self.parameter_group = {"params": parameters, "base_lr": LR, "lr": LR, "betas": BETAS, "weight_decay": 0.0}

    def parts(self):
        return {"generator": self.generator, "discriminator": self.discriminator, "discriminator_optimizer": self.optimizer}

    def state_dict(self):
        return {name: part.state_dict() for name, part in self.parts().items()}

    def load_state_dict(self, state):
        for name, part in self.parts().items():
            part.load_state_dict(state[name])

    def insert_generated(self, model, batch, scaler):
        """Replaces a batch's last k pictures by generated ones, and takes one step of the discriminator.

        batch: of `dataset.collate`, with pixels. Returns (batch, lambda * generator loss); the loss is ().
        """
        self.generator.train()  # `pictures` sets it to eval mode
        image, last = batch["image"], {name: value[-self.count :] for name, value in batch.items()}
        real = F.interpolate(last["image"].float(), size=IMAGE_SIZE, mode="area")
        with autocast(self.device, self.dtype):
            with torch.no_grad():
                embedding = F.normalize(model.text_projection(model.batch_text_features(last)).float(), dim=1)  # (k, d_e)
            fake = self.generator(torch.randn(self.count, NOISE_DIM).to(self.device), embedding)
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
        return batch | {"image": torch.cat([image[: -self.count].float(), enlarged])}, adversarial

    @torch.no_grad()
    def pictures(self, embeddings):
        """L2-normalised (n, d_e) embeddings -> (n, IMAGE_SIZE, IMAGE_SIZE, 3) uint8 array, from the same noise in each call."""
        noise = torch.randn(len(embeddings), NOISE_DIM, generator=torch.Generator().manual_seed(0)).to(self.device)
        return draw_pictures(self.generator, noise, embeddings.to(self.device))
