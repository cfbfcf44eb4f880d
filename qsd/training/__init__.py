"""Parts of a training that know no framework. The task, the callbacks and the hooks of `qsd.mm` use them."""
