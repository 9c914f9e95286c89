"""All that a notebook needs: `from covid3d.all import *`"""
from pathlib import Path

from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import MixUp
from fastai.callback.progress import CSVLogger, ShowGraphCallback
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.all import (ColReader, DataBlock, DataLoaders, FileSplitter, FuncSplitter, GrandparentSplitter, IndexSplitter,
                             ItemGetter, MaskSplitter, RandomSplitter, TrainTestSplitter, get_files)
from fastai.interpret import Interpretation, SegmentationInterpretation
from fastai.learner import Learner

from .volume import *
from .dicom import *
from .show import *
from .phantom import *
from .cases import *
from .datasets import *
from .transforms import *
from .patches import *
from .augment import *
from .prepare import *
from .data import *
from .encoder import *
from .unet import *
from .losses import *
from .metrics import *
from .inference import *
from .quantify import *
from .report import *
from .learner import *
from .evaluate import *
from .predict import *
