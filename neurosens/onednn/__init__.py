"""Convolutions by oneDNN on a CPU, mostly faster than those that XLA chooses.

The x86 builds of jaxlib contain oneDNN, and their runtime executes the custom calls
`__onednn$convolution` and `__onednn$matmul`; only their compiler does not emit them. `use_onednn`
lets JAX emit the first for the convolutions of every program that it compiles for a CPU from then
on, and for their gradients with respect to images. The call cannot ask for oneDNN's own gradients
with respect to kernels: these become convolutions by the cotangents where the processor has
AVX-512, and products of matrices elsewhere. The sums of batch normalisation, which need no call,
become loops that read images once.

The form of the calls is internal to jaxlib, and a call of another form may end the process.
Therefore they are used only with versions that they were tested with, and only after small
convolutions have given what XLA gives.
"""

from neurosens.onednn.lowering import use_onednn

__all__ = ['use_onednn']
