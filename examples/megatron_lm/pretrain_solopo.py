"""SoLoPO under Megatron-LM's own training loop. See README.md; started by pretrain_solopo.sh."""

from megatron.training import pretrain

from megatron_solopo.integrations.megatron_lm import Solopo

if __name__ == "__main__":
    Solopo().pretrain(pretrain)
