def cuda_error(device):
    return "no kernel of ours for cuda"
