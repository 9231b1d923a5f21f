"""Pictures generated from captions.

joint.py     trains the generator together with CLIP
networks.py  the generator, the discriminator and their losses
options.py   the flags of GAN.py
"""
