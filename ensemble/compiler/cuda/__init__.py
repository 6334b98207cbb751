"""The CUDA back end: convolutions of N models as one implicit GEMM per layer, in Triton."""
