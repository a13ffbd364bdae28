from . import augmentation as augmentation
from .dataset import Dataset as Dataset
from .dataset import Source as Source
from .dataset import stratified as stratified
from .sources import load as load
