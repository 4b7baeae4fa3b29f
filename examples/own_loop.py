"""Train with your own VAE, critics, key names and training loop, and with PyTorch optimizers."""

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Bounded
from torchrl.envs import GymEnv
from torchrl.modules import MLP
from torchrl.objectives import SoftUpdate

from torchrl_bcq import BCQLoss, BCQPolicy, PerturbationActor, QEnsemble


class MyVAE(nn.Module):  # has the members of torchrl_bcq.protocols.GenerativeModel
    observation_keys, action_key, latent_dim, latent_clip, loss_keys = ["state"], "torque", 2, 0.5, []

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = MLP(4, 4, num_cells=[64]), MLP(5, 1, num_cells=[64])

    def decode(self, td, latent):
        return td.set("torque", 2 * torch.tanh(self.decoder(td["state"], latent)))

    def training_loss(self, td, noise=None):
        loc, log_std = self.encoder(td["state"], td["torque"]).clamp(-4, 4).chunk(2, -1)
        latent = loc + log_std.exp() * torch.randn_like(loc)
        error = self.decode(td.copy(), latent)["torque"] - td["torque"]
        kl = (loc**2 + torch.exp(2 * log_std) - 1) / 2 - log_std
        return error.square().mean(-1) + 0.5 * kl.mean(-1), {}


torch.manual_seed(0)
raw = GymEnv("Pendulum-v1").rollout(2000, break_when_any_done=False)
following = {"state": raw["next", "observation"], "gain": raw["next", "reward"] / 10}
following |= {"over": raw["next", "done"], "failed": raw["next", "terminated"]}
data = TensorDict({"state": raw["observation"], "torque": raw["action"], "next": following}, [2000])

vae = MyVAE()
actor = PerturbationActor(MLP(4, 1), Bounded(-2, 2, (1,)), observation_keys=["state"], action_key="torque")
nets = [MLP(4, 1, num_cells=[64, 64], activation_class=nn.SiLU) for _ in range(3)]
critics = QEnsemble([TensorDictModule(net, in_keys=["state", "torque"], out_keys=["worth"]) for net in nets])
loss = BCQLoss(vae, actor, critics, lmbda=1.0)
loss.set_keys(reward="gain", done="over", terminated="failed")
updater = SoftUpdate(loss, tau=0.005)
optimizers = [torch.optim.Adam(part.parameters(), lr=1e-3) for part in (vae, critics, actor)]

for _ in range(200):
    batch = data[torch.randint(len(data), (100,))]
    losses = (loss.vae_loss, loss.qvalue_loss, loss.actor_loss)  # in the paper's order
    for compute, optimizer in zip(losses, optimizers, strict=True):
        optimizer.zero_grad()
        compute(batch)[0].backward()
        optimizer.step()
    updater.step()

torque = BCQPolicy(vae, actor, critics)(data.select("state"))["torque"]
print(f"mean TD error {batch['td_error'].mean():.3f}, torques from {torque.min():.2f} to {torque.max():.2f} N m")
