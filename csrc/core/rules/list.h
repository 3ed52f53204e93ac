// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// Every rule. CPU loops, CUDA kernels, bindings and tests follow from this list.
#pragma once

#include "adadelta.h"
#include "adagrad.h"
#include "adam.h"
#include "adamax.h"
#include "adan.h"
#include "ademamix.h"
#include "adopt.h"
#include "asgd.h"
#include "lamb.h"
#include "lars.h"
#include "lion.h"
#include "muon.h"
#include "nadam.h"
#include "radam.h"
#include "rmsprop.h"
#include "rprop.h"
#include "schedule_free.h"
#include "sgd.h"
#include "stable_adamw.h"

namespace fusedopt {

using Rules =
    TypeList<Adam, Sgd, RmsProp, Lion, AdEMAMix, Adopt, Adan, Adamax, Adadelta, RAdam, Adagrad,
             Rprop, NAdam, Asgd, ScheduleFreeAdamW, ScheduleFreeSgd, Muon, Lamb, Lars, StableAdamW>;

}  // namespace fusedopt
