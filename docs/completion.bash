# Completes `python -m train.run --mo<TAB>` and all other commands of Lapis:
#     source docs/completion.bash
# zsh wants this first: autoload -U compinit bashcompinit && compinit && bashcompinit
# Written by: python -m docs.completion
_lapis() {
  local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]}
  local command="" words="" flag="" i
  if [[ $word == --*=* ]]; then # --flag=value is one word for zsh, three for bash
    before=${word%%=*} flag=${word%%=*}= word=${word#*=}
  elif [[ $word == "=" ]]; then
    word=""
  elif [[ $before == "=" ]]; then
    before=${COMP_WORDS[COMP_CWORD-2]}
  fi
  for ((i = 2; i < COMP_CWORD; i++)); do
    if [[ ${COMP_WORDS[i]} == "--" ]]; then
      command=train.run # whose flags the profilers hand on
    elif [[ ${COMP_WORDS[i-1]} == "-m" && -z $command ]]; then
      command=${COMP_WORDS[i]}
    fi
  done
  if [[ $before == "-m" ]]; then
    words="train.run train.predict train.evaluate train.compare train.export train.study train.lr_find train.data.check train.data.pack train.doctor train.doctor.bench profiling.suite profiling.speed profiling.kernel_speed profiling.data_speed profiling.predict_speed profiling.nsys profiling.train_profile profiling.compare profiling.report profiling.aot profiling.counts profiling.scaling profiling.nvtx_cost profiling.window profiling.roofline"
  else
    case "$command $before" in
      "train.run --model") words="plain18 plain34 resnet18 resnet34 resnet50 micro_plain micro_resnet micro_bottleneck" ;;
      "train.run --act") words="relu leaky_relu silu gelu mish" ;;
      "train.run --norm") words="batch group layer" ;;
      "train.run --stem") words="imagenet small deep" ;;
      "train.run --shortcut") words="conv avgpool" ;;
      "train.run --init") words="kaiming xavier zeros constant" ;;
      "train.run --augment") words="none light strong heavy" ;;
      "train.run --sampler") words="random balanced" ;;
      "train.run --optimizer") words="sgd adamw" ;;
      "train.run --schedule") words="constant step cosine onecycle cyclic" ;;
      "train.run --loss") words="ce weighted_ce focal" ;;
      "train.run --recipe") words="default best report" ;;
      "train.run --backend") words="eager auto compile triton" ;;
      "train.run --device") words="auto cpu cuda" ;;
      "train.run --amp") words="auto bf16 fp16 off" ;;
      "train.predict --device") words="auto cpu cuda" ;;
      "train.predict --amp") words="auto bf16 fp16 off" ;;
      "train.evaluate --device") words="auto cpu cuda" ;;
      "train.evaluate --amp") words="auto bf16 fp16 off" ;;
      "train.export --format") words="state_dict safetensors onnx program" ;;
      "train.study --model") words="plain18 plain34 resnet18 resnet34 resnet50 micro_plain micro_resnet micro_bottleneck" ;;
      "train.study --act") words="relu leaky_relu silu gelu mish" ;;
      "train.study --norm") words="batch group layer" ;;
      "train.study --stem") words="imagenet small deep" ;;
      "train.study --shortcut") words="conv avgpool" ;;
      "train.study --init") words="kaiming xavier zeros constant" ;;
      "train.study --augment") words="none light strong heavy" ;;
      "train.study --sampler") words="random balanced" ;;
      "train.study --optimizer") words="sgd adamw" ;;
      "train.study --schedule") words="constant step cosine onecycle cyclic" ;;
      "train.study --loss") words="ce weighted_ce focal" ;;
      "train.study --recipe") words="default best report" ;;
      "train.study --backend") words="eager auto compile triton" ;;
      "train.study --device") words="auto cpu cuda" ;;
      "train.study --amp") words="auto bf16 fp16 off" ;;
      "train.study --language") words="en id" ;;
      "train.lr_find --model") words="plain18 plain34 resnet18 resnet34 resnet50 micro_plain micro_resnet micro_bottleneck" ;;
      "train.lr_find --act") words="relu leaky_relu silu gelu mish" ;;
      "train.lr_find --norm") words="batch group layer" ;;
      "train.lr_find --stem") words="imagenet small deep" ;;
      "train.lr_find --shortcut") words="conv avgpool" ;;
      "train.lr_find --init") words="kaiming xavier zeros constant" ;;
      "train.lr_find --augment") words="none light strong heavy" ;;
      "train.lr_find --sampler") words="random balanced" ;;
      "train.lr_find --optimizer") words="sgd adamw" ;;
      "train.lr_find --schedule") words="constant step cosine onecycle cyclic" ;;
      "train.lr_find --loss") words="ce weighted_ce focal" ;;
      "train.lr_find --recipe") words="default best report" ;;
      "train.lr_find --backend") words="eager auto compile triton" ;;
      "train.lr_find --device") words="auto cpu cuda" ;;
      "train.lr_find --amp") words="auto bf16 fp16 off" ;;
      "train.doctor --language") words="en id" ;;
      "profiling.window --capture") words="cuda nvtx" ;;
      *) if [[ $word == -* ]]; then
        case $command in
          train.run) words="--help --config --print-config --model --width --act --norm --stem --se --no-se --preact --no-preact --shortcut --antialias --no-antialias --dropout --drop-path --init --zero-init-residual --no-zero-init-residual --data --classes --relabel --limit --split --max-bad --val-fraction --fold --folds --accept-leak --no-accept-leak --image-size --start-scale --val-scale --val-crop --flips --no-flips --augment --mixup --cutmix --sampler --workers --epochs --batch-size --val-batch-size --accumulate --optimizer --lr --momentum --nesterov --no-nesterov --weight-decay --schedule --loss --label-smoothing --clip-grad --ema --pretrained --no-pretrained --init-from --layer-decay --freeze-epochs --sync-bn --no-sync-bn --recipe --fused --no-fused --backend --device --amp --channels-last --no-channels-last --threads --seed --deterministic --no-deterministic --doctor --no-doctor --auto-batch --no-auto-batch --steps-per-checkpoint --tensorboard --no-tensorboard --out --resume --debug --no-debug" ;;
          train.predict) words="--help --checkpoint --flips --no-flips --batch-size --device --amp --threads --debug --csv --json --top-k --cam" ;;
          train.evaluate) words="--data --help --checkpoint --flips --no-flips --batch-size --device --amp --threads --debug --json --out" ;;
          train.compare) words="--help --out --debug" ;;
          train.export) words="--help --checkpoint --format --out --debug" ;;
          train.study) words="--help --config --print-config --model --width --act --norm --stem --se --no-se --preact --no-preact --shortcut --antialias --no-antialias --dropout --drop-path --init --zero-init-residual --no-zero-init-residual --data --classes --relabel --limit --split --max-bad --val-fraction --fold --folds --accept-leak --no-accept-leak --image-size --start-scale --val-scale --val-crop --flips --no-flips --augment --mixup --cutmix --sampler --workers --epochs --batch-size --val-batch-size --accumulate --optimizer --lr --momentum --nesterov --no-nesterov --weight-decay --schedule --loss --label-smoothing --clip-grad --ema --pretrained --no-pretrained --init-from --layer-decay --freeze-epochs --sync-bn --no-sync-bn --recipe --fused --no-fused --backend --device --amp --channels-last --no-channels-last --threads --seed --deterministic --no-deterministic --doctor --no-doctor --auto-batch --no-auto-batch --steps-per-checkpoint --tensorboard --no-tensorboard --out --resume --debug --no-debug --models --seeds --jobs --language" ;;
          train.lr_find) words="--help --config --print-config --model --width --act --norm --stem --se --no-se --preact --no-preact --shortcut --antialias --no-antialias --dropout --drop-path --init --zero-init-residual --no-zero-init-residual --data --classes --relabel --limit --split --max-bad --val-fraction --fold --folds --accept-leak --no-accept-leak --image-size --start-scale --val-scale --val-crop --flips --no-flips --augment --mixup --cutmix --sampler --workers --epochs --batch-size --val-batch-size --accumulate --optimizer --lr --momentum --nesterov --no-nesterov --weight-decay --schedule --loss --label-smoothing --clip-grad --ema --pretrained --no-pretrained --init-from --layer-decay --freeze-epochs --sync-bn --no-sync-bn --recipe --fused --no-fused --backend --device --amp --channels-last --no-channels-last --threads --seed --deterministic --no-deterministic --doctor --no-doctor --auto-batch --no-auto-batch --steps-per-checkpoint --tensorboard --no-tensorboard --out --resume --debug --no-debug" ;;
          train.data.check) words="--help --labels --no-labels --out --debug --no-debug" ;;
          train.data.pack) words="--help --out --shard-mb --seed" ;;
          train.doctor) words="--help --explain --language --html --one-batch --no-one-batch --range-test --no-range-test --try --no-try --seeds --epochs --fix --no-fix --debug --no-debug" ;;
          train.doctor.bench) words="--help --out --jobs --quick --no-quick --kinds --half --seeds --debug --no-debug" ;;
          profiling.suite) words="--help --minutes --out --only --model --batches --image-size --rounds" ;;
          profiling.speed) words="--help --model --batch --mode --image-size --providers --baseline --rounds --seconds --minutes --out" ;;
          profiling.kernel_speed) words="--help --kernel --batch --dtype --providers --rounds --seconds --minutes --check --out" ;;
          profiling.data_speed) words="--help --data --out --image-size --batch-size --rounds" ;;
          profiling.predict_speed) words="--help --checkpoint --data --out --photos --batch-size --rounds" ;;
          profiling.nsys) words="--help --skip --steps --no-graph --out --against --limit --kineto --trace" ;;
          profiling.train_profile) words="--help --skip --steps --no-graph" ;;
          profiling.compare) words="--help --least" ;;
          profiling.report) words="--help" ;;
          profiling.aot) words="--help --arch --kernel --quick --json --workers" ;;
          profiling.counts) words="--help --renew --workers" ;;
          profiling.scaling) words="--help --gpus --machine --nvlink --network --latency --photo-kb --decoded --augmented" ;;
          profiling.nvtx_cost) words="--help --model --batch --image-size --rounds" ;;
          profiling.window) words="--help --skip --steps --no-graph --capture" ;;
          profiling.roofline) words="--help --out" ;;
        esac
      fi ;;
    esac
  fi
  COMPREPLY=($(compgen -P "$flag" -W "$words" -- "$word"))
}
complete -o bashdefault -o default -F _lapis python python3 torchrun
