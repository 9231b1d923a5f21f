"""Training a CLIP model, from the data to the report.

adapters.py        low-rank adapters (LoRA)
cca.py             heads that start from canonical correlation analysis
checkpoint.py      create, lock, checkpoint and resume a run folder
data.py            the training and validation split, and the loader of training batches
distributed.py     training in several processes (torchrun)
feature_cache.py   cache the outputs of frozen encoders
gradient_cache.py  the gradient of a large batch, computed in micro-batches
keeping.py         what fine-tuning forgets, and mixtures of weights that keep it
losses.py          the losses that --loss names, and the targets that --targets names
model_card.py      the model card of a run
optimization.py    the optimizer's parameter groups, and the learning rate schedule
plan.py            what a run would do, for --dry-run
report.py          what is printed and drawn during training and at its end
shard_reader.py    read and count shards
shards.py          write pictures and captions into shards
state.py           everything that training changes: created, saved and restored together
steps.py           one epoch, and its training steps
stream.py          training on shards: batches of their pictures, and validation pictures
trackers.py        send figures to TensorBoard, Weights & Biases, MLflow and trackio
trial.py           try a model before any picture is decoded
"""
