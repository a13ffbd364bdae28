from . import activation_maps as activation_maps
from . import conflict as conflict
from . import gradient_flow as gradient_flow
from . import reconstructions as reconstructions
from . import supervision as supervision
