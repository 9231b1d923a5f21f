"""Task sampler. The order of an epoch. self.captions_of[i] lists the captions of image i, self.real
is the number of images, and self.captions_per_image says how many captions to draw for each.
self.generated is 0 here: no image is generated."""


def draw(self, rng):
    """An epoch's images in random order, each with its captions and a seed: a list of (image, captions, seed).

    Each image is drawn once, so that no batch has it twice. captions: a list of captions_per_image of captions_of[image],
    all different where there are enough. seed: an int from 0 to 2**31 - 1, of the image's crop. rng: a NumPy Generator,
    which draws everything.
    """
    # BEGIN SOLUTION
    raise NotImplementedError("your code")
    # END SOLUTION
