"""Training of language models built from attnjax mechanisms: `python -m train --help`.

Every part can be used alone: `train.mesh.make_mesh`, `train.state.init_state`,
`train.step.make_train_step`, `train.data.ByteData`, `train.checkpoint.Checkpoints`. Nothing here
names a mechanism; which ones a model uses is the `mixers` pattern of its configuration.
"""
