"""Everything that depends on the machine: device, kernels, CPU stand-ins."""
