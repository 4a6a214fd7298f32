"""Everything that depends on the machine: device, kernel libraries, CPU patches of torch and SGLang."""
