# Of the folder that `make kernel` lays out for Hugging Face's kernel builder.
{
  description = "Kernels for sparse weight deltas in PyTorch";

  inputs.kernel-builder.url = "github:huggingface/kernels";

  outputs =
    { self, kernel-builder }:
    kernel-builder.lib.genKernelFlakeOutputs {
      inherit self;
      path = ./.;
    };
}
