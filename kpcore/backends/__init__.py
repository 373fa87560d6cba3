"""Where calls are checked and computed: `checks` of arguments, `devices`, kernels of the `cpu` and of the `gpu`."""
