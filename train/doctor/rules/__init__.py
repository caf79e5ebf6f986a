"""All rules, causes before consequences: of several problems the first is the primary one.

Silent bugs, which nothing else brings about and a loss may overflow from; numbers that are none;
data, labels and initialisation; learning rate too high and exploding gradients; vanishing
gradients, depth and shapes; BatchNorm on few images, whose noise kills units too; the dead units
they leave; too low a rate, stagnation and underfitting; a failing class and overfitting.
"""

from train.doctor.finding import Rule
from train.doctor.rules import (
    bn_small_batch,
    degradation,
    dying_relu,
    exploding_gradient,
    failing_class,
    geometry,
    input,
    leakage,
    lr_too_high,
    lr_too_low,
    non_finite,
    one_batch,
    overfit,
    silent_bug,
    stagnation,
    start_loss,
    symmetric_init,
    underfit,
    vanishing_gradient,
)

RULES: tuple[Rule, ...] = (
    silent_bug.RULE,
    non_finite.RULE,
    input.RULE,
    leakage.RULE,
    start_loss.RULE,
    symmetric_init.RULE,
    one_batch.RULE,
    lr_too_high.RULE,
    exploding_gradient.RULE,
    vanishing_gradient.RULE,
    degradation.RULE,
    geometry.RULE,
    bn_small_batch.RULE,
    dying_relu.RULE,
    lr_too_low.RULE,
    stagnation.RULE,
    underfit.RULE,
    failing_class.RULE,
    overfit.RULE,
)
