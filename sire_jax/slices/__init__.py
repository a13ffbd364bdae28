"""Which slices of arrays depend on what, followed through a traced program axis by axis.

A network may keep several layers in one array: ``nn.scan`` stacks them along an axis, ``nn.vmap``
the members of an ensemble, and a network may index a stack by hand. An exit after the first layer
then reaches one slice of an array whose others it does not know. What becomes of an axis is known
of the operations that move, pad, cut or join arrays, of sums, windows, matrix products and
convolutions. Where it is not known which slices depend, such as those at an index that a loop
changes, or of members that go through an operation not known here, that is noted (``Unclear``).

It matters in the end for the axes of parameters alone: what is summed over, as examples and
positions are in the gradients of dense layers and convolutions, is forgotten. So as not to doubt
parameters that no layers share, three things are assumed, by which slices may count as reached that
are not. An operation not known here keeps an axis at its place, if its length is the same there, or
else among those of its length, if any. What is looked up at many places, as in an embedding, is a
table of which any loss reaches all: layers or members picked by an array of indices are not told
apart, as those at one index are. And slices along different axes of one array are together all of
it.
"""

from sire_jax.slices.marks import Marks
from sire_jax.slices.programs import dependencies
from sire_jax.slices.reach import Partly, Unclear, reached, together

__all__ = ["Marks", "Partly", "Unclear", "dependencies", "reached", "together"]
