"""llama.cpp through llama-cpp-python's low-level API: the only place that imports ``llama_cpp`` or uses ctypes.

Every native return code is checked here and becomes an :class:`EngineError` that names the call; owners of native
memory are context managers. Facts about the library hold for the pinned version (``patches/PIN``).

Nothing is imported here: a model can be loaded (:mod:`kvcompose_local.llama_ffi.model`) before NumPy is.
"""
