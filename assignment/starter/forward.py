"""Task forward. From features to logits. self.image_projection and self.text_projection map
features to embeddings; self.logit_scale is the log of the inverse temperature."""

import torch
import torch.nn.functional as F


def logits(self, I_f, T_f):
    """Features of n images and m captions, (n, d_i) and (m, d_t) -> (n, m) scaled cosines, in fp32 under autocast, too."""
    # BEGIN SOLUTION
    raise NotImplementedError("your code")
    # END SOLUTION
